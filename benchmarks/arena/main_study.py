"""The main table: every method with the same tuning budget, tuned on domains that it is not tested on.

Tuning: six settings each, three rates by two values of the method's main option, or six rates where it has none; one
seed, validation records of `TUNING` domains, chosen by the lowest mean bits per byte after the last domain. Testing:
what was chosen, on the test records of `TESTING` domains, on which no row was tuned, five seeds; and three seeds at
other rates (`FACTORS`), for curves of what is lost at equal learning. The pull and the nulls that come near it have
curves at their other strength too, EWC and K-FAC Laplace at thrice their own, since strength buys keeping with learning
as a rate does.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_cl.methods import METHODS

from .nulls import NULLS

RATES = (3e-4, 1e-3, 3e-3)
SIX_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3)
TUNING = ("sql-create-context", "aqua-rat", "medmcqa", "creak")
TESTING = ("mbpp", "gsm8k", "medquad", "ecqa")
"""Code, mathematics, medicine and general text, each by another source."""
DATA = (TUNING + TESTING, 256)
"""Their sources, and how many records of each are held out for testing."""
TUNING_SEED, SEEDS, OF_CURVES = 100, (0, 1, 2, 3, 4), (0, 1, 2)
TWICE = (2.0,)
FACTORS: Mapping[str, tuple[float, ...]] = {
    "elastic": (0.5, 0.25, 0.125),
    **dict.fromkeys(("ewc", "curvature", "null-one", "null-moments"), (0.5,)),
    "null-strengths": (0.5, 0.25),
    "null-directions": (2.0, 0.5, 0.25),
    "self-replay": (2.0, 0.5),
    **dict.fromkeys(("orthogonal", "sfa", "l2-sp"), (2.0, 0.5)),
}
"""Of the rate, for curves: `TWICE` but for rows that learn nearly as much as any, or no more at twice the rate."""

OPTIONS: Mapping[str, dict[str, Any]] = {
    "lora": {"rank": 8},
    "lora-wd": {"weight_decay": 1.0},
    "freeze-lower": {"frozen_share": 0.75},
    "ewc": {"ewc_lambda": 1000.0},
    "mofo": {"fraction": 0.05},
    "migu": {"quantile": 0.9},
    "o-lora": {"lambda_1": 5.0},
    "osf": {"effective_rank": 0.7},
    "sparse-masked": {"fraction": 0.05},
    "sparse-masked-lora": {"fraction": 0.05},
    "selective-write": {"closed": 0.5},
    "orthogonal": {"energy": 0.9},
    "orthogonal-lora": {"energy": 0.9},
    "orthogonal-masked": {"energy": 0.9},
    "elastic": {"strength": 5.0},
    "elastic-lora": {"strength": 2.0},
    "curvature": {"mode": "hard"},
    "two-four": {"score": "fisher"},
    "early-stopping": {"share": 0.25},
    "lora-mean": {"rank": 8},
    **dict.fromkeys(("kfac-laplace", "kfac-rows"), {"ewc_lambda": 1000.0}),
    "l2-sp": {"alpha": 1.0},
    "sfa": {"mean": "running"},
    "osft": {"effective_rank": 0.7},
    "self-replay": {"share": 0.2},
    "routed": {"share": 0.3},
}
"""Another value of each method's main option."""

ENTRIES: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{name: (name, {}, {}) for name in ("adamw", "replay-1", "replay-5", "soap", "joint", "single")},
    **{name: (name, {}, other) for name, other in OPTIONS.items()},
    **{f"null-{null}": ("elastic-null", {"null": null}, {"strength": 5.0}) for null in NULLS},
}
"""Row → method, its options in any case, and another value of its main option; none: it has the rates alone."""

ASKED_FIRST = (
    *("elastic", *(f"null-{null}" for null in NULLS), "elastic-lora", "curvature", "orthogonal"),
    *("adamw", "lora", "sfa", "l2-sp", "self-replay", "replay-5", "ewc", "kfac-laplace", "kfac-rows", "soap"),
    *("osft", "replay-1", "lora-mean", "early-stopping"),
)
"""Rows that are run before the others: the pull, its nulls and kin, and what it is measured against."""

BEYOND: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "ewc": ("ewc_lambda", (1e4, 3e3)),
    "l2-sp": ("alpha", (10.0,)),
    "o-lora": ("lambda_1", (50.0,)),
    **dict.fromkeys(("kfac-laplace", "kfac-rows"), ("ewc_lambda", (10.0,))),
    "null-one": ("strength", (1.25,)),
    "null-strengths": ("strength", (80.0,)),
}
"""A row's option, and values beyond the one of its two that tuning chose."""
NEXT_RATE = {RATES[0]: 1e-4, RATES[-1]: 1e-2}
"""The one that follows an end of `RATES`."""

LONG = ("elastic", "adamw", "ewc", "kfac-laplace", "replay-5", "sfa")
"""Rows that run for longer, too: the pull, no protection, and the baselines that end lowest."""

OTHER_STRENGTHS: Mapping[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "elastic": ({}, (1, 0.5, 0.25)),
    "null-one": ({"null": "one"}, (1, 0.5, 0.25)),
    "null-strengths": ({"null": "strengths", "strength": 5.0}, (1, 0.5, 0.25)),
    "ewc": ({"ewc_lambda": 3000.0}, (1, 2, 0.5)),
    "kfac-laplace": ({"ewc_lambda": 300.0}, (1, 2)),
}
"""Rows that are run at a strength that tuning did not choose, too, and the factors of the rate: the pull, the nulls
that come near it, and the baselines that do, at thrice their strength."""
OTHER = ", other strength"
"""Of the names of their rows."""


def settings_of(entry: str) -> list[dict[str, Any]]:
    """The six settings of a row: `method`, `lr` and `options`."""
    method, fixed, other = ENTRIES[entry]
    tried = itertools.product(RATES, (fixed, {**fixed, **other})) if other else ((lr, fixed) for lr in SIX_RATES)
    return [{"method": method, "lr": lr, "options": options} for lr, options in tried]


def tuning_points() -> dict[str, dict[str, Any]]:
    """Name of a run → its settings. What the first place is for is in every row before any row has the second."""
    six = {entry: settings_of(entry) for entry in ENTRIES}
    return {f"{entry}.{number}": six[entry][number] for number in range(6) for entry in ENTRIES}


def best(runs: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Of the rows with all six runs, the one with the lowest mean bits per byte after the last domain.

    Args:
        runs: what is kept of the tuning; `name` is that of the run. One that failed was tried, and is not the best.
    """
    by_name = {run["name"]: run for run in runs}
    found = {}
    for entry in ENTRIES:
        own = [by_name[name] for number in range(6) if (name := f"{entry}.{number}") in by_name]
        ended = [run for run in own if "failed" not in run]
        if len(own) == 6 and ended:
            found[entry] = min(ended, key=lambda run: run["summary"]["acc"])
    return found


def chosen(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings of `best`."""
    return {entry: settings_of(entry)[int(run["name"].rpartition(".")[2])] for entry, run in best(runs).items()}


def further(points: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Beyond what tuning chose from: the next rate where it chose the last one, and `BEYOND`; by "row.rate" and
    "row.option-value". Of baselines and nulls alone, so that they are tried at more settings than ours."""
    found = {}
    for entry, point in points.items():
        if METHODS[point["method"]].kind != "baseline":
            continue
        if point["lr"] in NEXT_RATE:
            found[f"{entry}.rate"] = {**point, "lr": NEXT_RATE[point["lr"]]}
        option, values = BEYOND.get(entry, ("", ()))
        for value in values:
            found[f"{entry}.{option}-{value:g}"] = {**point, "options": {**point["options"], option: value}}
    return found


def curves(points: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The points of `chosen` at other rates, by "row@factor", without bounds: they forget nothing."""
    return {
        f"{entry}@{factor:g}": {**point, "lr": point["lr"] * factor}
        for entry, point in points.items()
        for factor in FACTORS.get(entry, TWICE)
        if METHODS[point["method"]].kind != "bound"
    }


def other_strengths(points: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`OTHER_STRENGTHS` of the points of `chosen`, by "row@other-factor"."""
    return {
        f"{entry}@other-{factor:g}": {**points[entry], "lr": points[entry]["lr"] * factor, "options": options}
        for entry, (options, factors) in OTHER_STRENGTHS.items()
        for factor in factors
    }


def row_and_factor(name: str) -> tuple[str, str]:
    """What a run is of, by its name: its row, and the factor of the rate, empty at the one chosen."""
    row, _, factor = name.rpartition("-given-seed")[0].partition("@")
    if factor.startswith("other-"):
        return row + OTHER, factor.removeprefix("other-").removesuffix("1")
    return row, factor
