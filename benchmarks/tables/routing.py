"""Tables of the study `routed`: routing by token beside its controls."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from benchmarks.arena.compare import gather_runs
from benchmarks.arena.curves import Beside, beside
from benchmarks.arena.pareto import lines_of

from .cells import number, results, several, table

_THROUGH = {
    "top": "its own k most active neurons",
    "mask": "the k that are most active on its domain (one mask a domain)",
    "random": "any k, drawn anew each time",
    "none": "all neurons",
    "adamw": "sequential AdamW, all weights",
}
"""Point of the study, without the rate → what a token's contribution runs through."""


def routing() -> str:
    """A row for each way and rate: means over orders and seeds, and the least and the most."""
    rows = []
    for way, through in _THROUGH.items():
        first = True
        for rate in sorted({run["settings"]["lr"] for run in runs_of(way)}, reverse=True):
            runs = [run for run in runs_of(way) if run["settings"]["lr"] == rate]
            forms = {"learned": ".2f", "gain_lost": ".0%", "acc": ".2f"}
            cells = [several([run["summary"][key] for run in runs], form) for key, form in forms.items()]
            rows.append([through if first else "", f"{rate:g}", str(len(runs)), *cells])
            first = False
    return table(("a token runs through", "rate", "runs", "learned", "lost", "ACC"), rows)


def beside_top(order: int | None = None) -> dict[str, Beside]:
    """By way, what it loses more than routing by token where both have learned the same; in one order or in all."""
    compared = {way: gather_runs((run["name"], run) for run in runs_of(way)) for way in _THROUGH}
    orders = compared["top"].orders
    lines = {}
    for way, found in compared.items():
        (lines[way],) = lines_of(found.rows)
    top = lines.pop("top")
    asked = orders if order is None else orders[order : order + 1]
    return {way: beside(line, top, asked) for way, line in lines.items()}


def routing_equal() -> str:
    """What the others lose more than routing by token where both have learned the same."""
    rows = []
    for way, found in beside_top().items():
        if found.more is None or found.learned is None:
            rows.append([_THROUGH[way], "", ""])
            continue
        half = f" ± {number(100 * found.more.half_width, '.1f')}" if found.more.half_width else ""
        low, high = (number(end, ".2f") for end in found.learned)
        rows.append([_THROUGH[way], number(100 * found.more.mean, "+.1f") + half, f"{low} to {high}"])
    return table(("a token runs through", "points lost more", "where both have learned"), rows)


def lowest_end(way: str) -> float:
    """ACC at the rate where it is lowest, mean over orders and seeds."""
    by_rate: dict[float, list[float]] = {}
    for run in runs_of(way):
        by_rate.setdefault(run["settings"]["lr"], []).append(run["summary"]["acc"])
    return min(map(fmean, by_rate.values()))


def shared_neurons(way: str) -> tuple[float, float, float]:
    """How many of a token's neurons a token of its domain has too, one of an earlier domain, and one by chance."""
    layers = [layer for run in runs_of(way) for layer in run["domain_records"][-1]["routing"].values()]
    return (
        fmean(layer["itself"] for layer in layers),
        fmean(share for layer in layers for share in layer["earlier"]),
        fmean(layer["chance"] for layer in layers),
    )


def routing_shared() -> str:
    """How many of a token's neurons another token has too, after the last domain."""
    rows = [
        [_THROUGH[way], *(number(share, ".1%") for share in shared_neurons(way))] for way in ("top", "mask", "random")
    ]
    return table(("a token runs through", "of its domain", "of an earlier domain", "by chance"), rows)


def runs_of(way: str) -> list[Mapping[str, Any]]:
    """A way's runs, of the seeds that have every point of the study.

    Raises:
        ValueError: no seed has.
    """
    runs = [run for run in results("arena/routed")["runs"] if "failed" not in run]
    points = {seed: {_point(run) for run in runs if run["seed"] == seed} for seed in {run["seed"] for run in runs}}
    every = set().union(*points.values())
    found = [run for run in runs if run["name"].startswith(f"{way}-") and points[run["seed"]] == every]
    if not found:
        raise ValueError(f"arena/routed.json: no seed has all of {', '.join(sorted(every))}; run the study to its end")
    return found


def _point(run: Mapping[str, Any]) -> str:
    return run["name"].rpartition("-seed")[0]
