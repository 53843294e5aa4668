"""How numbers and tables of the docs are written, and where their results lie."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

CALLED = {
    "adamw": "AdamW",
    "elastic": "`elastic`",
    "elastic-lora": "`elastic-lora`",
    "lora": "LoRA",
    "ewc": "EWC",
    "kfac-laplace": "K-FAC Laplace",
}
"""Method → its name in sentences."""
RESULTS = Path(__file__).parents[1] / "results"


@functools.cache
def results(name: str) -> Any:
    """What a file of results holds."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def number(value: float, form: str) -> str:
    """By a format of Python's; "%" in it: a percentage, with the space that units have."""
    shown = f"{value:{form}}".replace("%", " %")
    if not shown.strip("-+0. %"):
        shown = shown.lstrip("-+")
    return shown.replace("-", "−")


def bare(value: float, form: str) -> str:
    """`number` without a zero before the point."""
    return re.sub(r"\b0\.", ".", number(value, form))


def several(values: Sequence[float], form: str) -> str:
    """The mean, and of more than one value the least and the most."""
    mean = number(fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ({number(min(values), form)} to {number(max(values), form)})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown, with a line's end."""
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|\n" for cells in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header) + "\n")
    return "".join(lines)


def bold(cells: Sequence[str]) -> list[str]:
    """A row that is to be seen first."""
    return [f"**{cell}**" if cell else cell for cell in cells]


def mean_of(study: str, key: str, *points: str) -> float:
    """Mean over the runs of points, each with its order."""
    runs = [run for run in results(f"arena/{study}")["runs"] if run["name"].rpartition("-seed")[0] in points]
    return fmean(run["summary"][key] for run in runs)


def named(run: Mapping[str, Any], point: str) -> bool:
    """Whether a run is of a point, with its order."""
    return run["name"].startswith(f"{point}-seed")


def harder(run: Mapping[str, Any]) -> float:
    """By how much base text became harder in a run, bits per byte."""
    return run["R_reference"][-1] - run["R_reference"][0]


def between(values: Iterable[float], form: str) -> str:
    """The least and the most; a percent sign stands once."""
    ends = sorted(values)
    low, high = number(ends[0], form), number(ends[-1], form)
    return f"{low.removesuffix(' %')} to {high}"


def sixteen() -> dict[tuple[str, str], Mapping[str, Any]]:
    """Model and method → run over sixteen domains."""
    return {(run["settings"]["model"], run["method"]): run for run in results("arena/ceiling")["runs"]}


def answers(run: Mapping[str, Any], metric: str, domains: int) -> tuple[float, float, float]:
    """Mean share of right answers of the first domains: by the base model, when each had been learned, and at the end.

    Args:
        metric: "accuracy" or "exact_match".
        domains: how many; those without such records are left out.
    """
    scores = run["R"][metric]
    asked = [j for j in range(domains) if scores[j + 1][j] is not None]
    base, learned, end = zip(*((scores[0][j], scores[j + 1][j], scores[-1][j]) for j in asked), strict=True)
    return fmean(base), fmean(learned), fmean(end)


def exact_answers(run: Mapping[str, Any]) -> tuple[float, float]:
    """Mean share of exact answers of the domains but the last, when each had just been learned and at the end."""
    return answers(run, "exact_match", len(run["domains"]) - 1)[1:]
