"""Tables of README and docs, made of the results that are kept; each stands between marks that name it.

`python -m benchmarks.tables` writes all of them anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from . import conjectures, costs, methods, models, routing

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "results" / "README.md")
TABLES: Mapping[str, Callable[[], str]] = {
    "active-linear": costs.active_linear,
    "adamw-step": costs.adamw_step,
    "ceiling": methods.ceiling_learned,
    "ceiling-forecasts": methods.ceiling_forecasts,
    "conjectures": conjectures.conjectures,
    "cosines": models.cosines,
    "demo": methods.demo,
    "drift-of-methods": models.drift_of_methods,
    "drift-short": models.drift_short,
    "elastic-step": costs.elastic_step,
    "exponents": models.exponents,
    "further": methods.further,
    "gemma": lambda: methods.study("gemma", ".3f"),
    "landed": methods.landed,
    "learn-first": methods.learn_first,
    "learn-second": methods.learn_second,
    "leak": costs.leak,
    "linear-algebra": costs.linear_algebra,
    "long": methods.long,
    "main": methods.main,
    "main-short": methods.main_short,
    "overlap": models.overlap,
    "permuted-digits": methods.permuted_digits,
    "plan-gpus": costs.plan_gpus,
    "plan-h200": costs.plan_h200,
    "planner-check": costs.planner_check,
    "plasticity": methods.plasticity,
    "qwen": lambda: methods.study("qwen", ".3f"),
    "real-models": models.real_models,
    "routed-linear": costs.routed_linear,
    "routing": routing.routing,
    "routing-equal": routing.routing_equal,
    "routing-shared": routing.routing_shared,
    "shared-features": methods.shared_features,
    "sharded-memory": costs.sharded_memory,
    "size": methods.sizes,
    "streams": methods.streams,
    "tracks": lambda: methods.study("tracks"),
    "tuned": methods.tuned,
    "waking": lambda: methods.study("waking"),
    "waking-choice": lambda: methods.study("waking-choice"),
    "widths": models.widths,
}
"""Name → its Markdown, with a line's end."""
_MARKED = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->\n)", re.DOTALL)
_MEASURED = re.compile(r"\d\.\d|\.\d\d|\d %")


def written(text: str) -> str:
    """A document with each of its marked tables as the results have it.

    Raises:
        KeyError: a mark names no table.
    """
    return _MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[4], text)


def unmarked(text: str) -> list[str]:
    """Headers of a document's tables that hold measured numbers and stand between no marks."""
    lines = _MARKED.sub("", text).splitlines()
    begins = [i - 1 for i, line in enumerate(lines) if re.fullmatch(r"\|[-| :]+\|", line)]
    ends = [next((k for k in range(i, len(lines)) if not lines[k].startswith("|")), len(lines)) for i in begins]
    return [lines[i] for i, end in zip(begins, ends, strict=True) if _MEASURED.search(" ".join(lines[i + 2 : end]))]
