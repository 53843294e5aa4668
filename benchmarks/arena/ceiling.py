"""What the account of capacity forecasts of the next domain, beside what is then learned: the study `ceiling`.

For domain j, before it is learned: C, the free share of a layer's directions, B, the share of the domain's gradient
that lies in it (means over layers), and C·B. What is learned is the fall of the domain's bits per byte, as a share of
that of a fresh model that learns it alone. A forecast is such a share; its error is in bits per byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.stats import spearmanr

from sparse_cl.four_domains.figures import new_figure
from sparse_cl.four_domains.report import text_table

METRIC = "bits_per_byte"
FORECASTS = ("all of it", "as the last", "as those before", "C", "B", "C·B")
LEARNED = ("model", "method", "learned", "lost", "ACC", "1–4", "5–8", "9–12", "13–16", "free at the end")
FORECAST = ("model", "method", *FORECASTS)


def shares(run: Mapping[str, Any], single: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """For each domain what was learned of it over what a model of its own learns, and the latter in bits per byte."""
    R, alone = run["R"][METRIC], single["R"][METRIC]
    own = [alone[0][j] - alone[j + 1][j] for j in range(len(run["domains"]))]
    return [(R[0][j] - R[j + 1][j]) / own[j] for j in range(len(own))], own


def forecasts(run: Mapping[str, Any], learned: Sequence[float], own: Sequence[float]) -> dict[str, list[float]]:
    """By `FORECASTS` the forecast of the second domain and those after it; of the first there is none.

    Args:
        learned, own: as `shares` returns them. "as those before" is the share of what all earlier ones have together.
    """
    rooms = [record.get("room") for record in run["domain_records"]]
    found = {"all of it": [1.0] * (len(learned) - 1), "as the last": list(learned[:-1])}
    bits = [share * size for share, size in zip(learned, own, strict=True)]
    found["as those before"] = [sum(bits[:j]) / sum(own[:j]) for j in range(1, len(own))]
    if len(rooms) == len(learned) and None not in rooms:
        free = [room["free"] for room in rooms[:-1]]
        kept = [room["surviving"] for room in rooms[1:]]
        found |= {"C": free, "B": kept, "C·B": [c * b for c, b in zip(free, kept, strict=True)]}
    return found


def judged(run: Mapping[str, Any], single: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By forecast its mean absolute error in bits per byte, and its rank correlation with what was learned."""
    learned, own = shares(run, single)
    found = {}
    for name, values in forecasts(run, learned, own).items():
        errors = [abs(value - real) * size for value, real, size in zip(values, learned[1:], own[1:], strict=True)]
        varied = len(set(values)) > 1 and len(set(learned[1:])) > 1
        ranks = spearmanr(values, learned[1:]).statistic if varied else float("nan")
        found[name] = {"error": fmean(errors), "rank": float(ranks)}
    return found


def by_model(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Model → method → run; one that failed is left out."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for run in runs:
        if "failed" not in run:
            found.setdefault(run["settings"]["model"], {})[run["method"]] = run
    return found


def pairs(runs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Each run that learned the domains one after another, and the one of its model that learned each alone."""
    for methods in by_model(runs).values():
        for method, run in methods.items():
            if method != "single" and "single" in methods:
                yield run, methods["single"]


def learned_rows(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """By `LEARNED`: what was learned early and late, of what a fresh model learns of each domain alone."""
    rows = []
    for methods in by_model(runs).values():
        if single := methods.get("single"):
            rows.append([*_ends(single), *[""] * 5])
        for run, alone in pairs(list(methods.values())):
            rows.append([*_ends(run), *early_and_late(run, alone)])
    return rows


def _ends(run: Mapping[str, Any]) -> list[str]:
    summary = run["summary"]
    lost = "" if summary["gain_lost"] is None else f"{100 * summary['gain_lost']:.0f} %".replace("-", "−")
    return [run["settings"]["model"], run["method"], f"{summary['learned']:.2f}", lost, f"{summary['acc']:.2f}"]


def early_and_late(run: Mapping[str, Any], single: Mapping[str, Any]) -> list[str]:
    """Shares learned of four domains each, and C after the last."""
    learned, own = shares(run, single)
    bits = [share * size for share, size in zip(learned, own, strict=True)]
    last = run["domain_records"][-1].get("room")
    cells = [f"{sum(bits[a : a + 4]) / sum(own[a : a + 4]):.2f}" for a in (0, 4, 8, 12)]
    return [*cells, f"{last['free']:.2f}" if last else ""]


def forecast_rows(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """By `FORECAST`: each forecast's mean error in bits per byte, and its rank correlation with what was learned."""
    rows = []
    for run, single in pairs(runs):
        scores = judged(run, single)
        cells = [_error(scores[name]) if name in scores else "" for name in FORECASTS]
        rows.append([run["settings"]["model"], run["method"], *cells])
    return rows


def _error(found: Mapping[str, float]) -> str:
    rank = "" if math.isnan(found["rank"]) else f" ({found['rank']:+.2f})".replace("-", "−")
    return f"{found['error']:.3f}{rank}"


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Both tables, with what they say."""
    note = (
        f"{LEARNED[5]} …: share learned of these domains, of what a fresh model learns of each alone; free: C after\n"
        "the last. Then, for the second domain and those after it, each forecast's mean error in bits per byte, and\n"
        "its rank correlation with what was learned."
    )
    return "\n\n".join((text_table(LEARNED, learned_rows(runs)), text_table(FORECAST, forecast_rows(runs)), note))


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The share that C·B forecasts against the share that was learned, a panel for each model."""
    models = by_model(runs)
    figure, axes = new_figure(1, len(models), 4.5, 4.0)
    for axis, (model, methods) in zip(axes[0], models.items(), strict=True):
        for marker, (run, single) in zip("os^v", pairs(list(methods.values())), strict=False):
            learned, own = shares(run, single)
            if "C·B" in (found := forecasts(run, learned, own)):
                axis.plot(found["C·B"], learned[1:], marker, label=run["method"], markersize=5, fillstyle="none")
        axis.plot([0, 1], [0, 1], ":", color="grey", linewidth=1)
        # Of one domain a fresh model learns next to nothing, so its share is anything.
        axis.set(xlabel="C·B before the domain", title=model, ylim=(-0.5, 1.5))
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("learned, of what a fresh model learns")
    figure.savefig(path, dpi=130)
