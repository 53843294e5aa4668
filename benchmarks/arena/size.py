"""Forgetting at matched learning against the size of the model: the study `size`, with AdamW's runs of `gemma`.

A model learns more and forgets more at higher rates, and where its optimum lies depends on its size. So models are
compared where each has learned the share `MATCHED` of what it learns at its best rate: on the rising part of the curve,
interpolated over the logarithm of the rate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from sparse_cl.four_domains.figures import new_figure
from sparse_cl.four_domains.report import text_table
from sparse_cl.probes.scaling import fit_exponent

from .grid import KEPT, kept

MATCHED = 0.9
FAMILY = "pretrained"
"""Of the scale study: models that differ in width alone."""
OTHERS = {"gemma-trimmed": 160_013_056, "qwen-coder-0.5b": 630_000_000}
"""Parameters of models that the scale study does not have."""


@dataclass(frozen=True)
class Point:
    """What one model, with one seed of the run, loses of its gains where it has learned `MATCHED` of its best.

    Attributes:
        learned: there, in bits per byte.
        lost: share of the gains that is gone after the last domain.
        rate: of AdamW, interpolated.
    """

    model: str
    parameters: int
    learned: float
    lost: float
    rate: float

    @property
    def of_family(self) -> bool:
        return self.model.startswith(FAMILY)


def matched(runs: Sequence[Mapping[str, Any]]) -> tuple[float, float, float] | None:
    """Rate, learned and share lost where `MATCHED` of the best is learned.

    Args:
        runs: of one model and seed, at several rates; one that failed is left out.

    Returns:
        None where nothing was learned, or the lowest rate that was tried learns more already.
    """
    curve = sorted(
        (run["settings"]["lr"], run["summary"]["learned"], run["summary"]["gain_lost"])
        for run in runs
        if "failed" not in run
    )
    best = max(range(len(curve)), key=lambda i: curve[i][1], default=None)
    if best is None or curve[best][1] <= 0:
        return None
    rising, wanted = curve[: best + 1], MATCHED * curve[best][1]
    below = [i for i, (_, learned, _) in enumerate(rising) if learned <= wanted]
    if not below:
        return None
    (low, less, lost), (high, more, lost_more) = rising[below[-1]], rising[below[-1] + 1]
    part = (wanted - less) / (more - less)
    rate = math.exp((1 - part) * math.log(low) + part * math.log(high))
    return rate, wanted, (1 - part) * lost + part * lost_more


def points(runs: Sequence[Mapping[str, Any]], parameters: Mapping[str, int]) -> list[Point]:
    """A point for each model, seed and order of the domains, by size.

    Args:
        runs: those of other methods than AdamW are left out.
        parameters: of each model by its name; models that are not among them are left out.
    """
    curves: dict[tuple[str, int, tuple[str, ...]], list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["method"] == "adamw" and run["settings"]["model"] in parameters:
            curves.setdefault((run["settings"]["model"], run["seed"], tuple(run["domains"])), []).append(run)
    found = [(model, at) for (model, *_), curve in curves.items() if (at := matched(curve)) is not None]
    every = [Point(model, parameters[model], learned, lost, rate) for model, (rate, learned, lost) in found]
    return sorted(every, key=lambda point: (point.parameters, point.model))


def of_results() -> list[Point]:
    """The points of the studies `size` and `gemma` as they are kept."""
    scales = json.loads((KEPT.parent / "scale-study.json").read_text(encoding="utf-8"))
    parameters = OTHERS | {model["model"]: model["parameters"] for model in scales}
    return points([*kept("size"), *kept("gemma")], parameters)


def exponent(found: Sequence[Point]) -> tuple[float, float]:
    """b and its standard error in lost = c · parameters^b, of the family alone."""
    family = [point for point in found if point.of_family]
    return fit_exponent([point.parameters for point in family], [point.lost for point in family])


HEADER = ("", "parameters", "seeds", "rate there", "learned", "lost")


def rows(found: Sequence[Point]) -> list[list[str]]:
    """Of each size: means over seeds, and the least and the most of the share lost."""
    cells = []
    for size in dict.fromkeys(point.parameters for point in found):
        own = [point for point in found if point.parameters == size]
        lost = [point.lost for point in own]
        name = f"width {own[0].model.split('-')[1]}" if own[0].of_family else own[0].model
        spread = f" ({min(lost):.0%} to {max(lost):.0%})" if len(own) > 1 else ""
        learned, rate = fmean(p.learned for p in own), math.exp(fmean(math.log(p.rate) for p in own))
        many = [name, f"{size / 1e6:.3g} M", str(len(own)), f"{rate:.1e}", f"{learned:.2f}"]
        cells.append([*many, f"{fmean(lost):.0%}{spread}".replace("%", " %").replace("-", "−")])
    return cells


def sentence(found: Sequence[Point]) -> str:
    """How the share lost goes with the size, of the family."""
    slope, error = exponent(found)
    sure = abs(slope) > 2 * error
    how = ("falls" if slope < 0 else "rises") if sure else "neither falls nor rises for sure"
    power = f"parameters^({slope:.2f} ± {2 * error:.2f})".replace("-", "−")
    where = f"Where AdamW has learned {100 * MATCHED:.0f} % of its best"
    return f"{where}, the share lost {how} with the size: it goes as {power}."


def table(found: Sequence[Point]) -> str:
    """A row for each size, and the sentence."""
    return f"{text_table(HEADER, rows(found))}\n\n{sentence(found)}"


def draw(found: Sequence[Point], path: Path) -> None:
    """The share lost against the number of parameters, with the family's line."""
    figure, axes = new_figure(1, 1, 6.0, 4.0)
    axis = axes[0][0]
    for alike, marker in ((True, "o"), (False, "s")):
        own = [point for point in found if point.of_family == alike]
        if not own:
            continue
        others = ", ".join(dict.fromkeys(point.model for point in own))
        label = "Llamas that differ in width alone" if alike else others
        axis.plot([p.parameters for p in own], [p.lost for p in own], marker, label=label, fillstyle="none")
    family = [point for point in found if point.of_family]
    sizes = np.array([point.parameters for point in family], dtype=float)
    slope, _ = exponent(found)
    middle = fmean(math.log(point.lost) - slope * math.log(point.parameters) for point in family)
    axis.plot(sizes, math.exp(middle) * sizes**slope, "-", color="grey", linewidth=1)
    axis.set(xscale="log", xlabel="parameters", ylabel=f"lost, where {MATCHED:.0%} of the best is learned")
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
