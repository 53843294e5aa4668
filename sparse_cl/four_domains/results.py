"""The files of a run: results.json, which repeats bit by bit, and costs.json, which a clock and a machine have made."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_cl.methods import Method
from sparse_cl.models.loading import versions

from .evaluate import METRICS
from .files import RESULTS, read_json, write_json
from .metrics import LOWER_IS_BETTER, intransigence, of_separate_models, summarize
from .sequence import Progress
from .settings import Settings

COSTS = "costs.json"
CLOCKED = ("seconds", "step_seconds", "peak_memory_bytes")
"""What is measured by a clock, or of the machine; no two runs have the same."""


def _header(name: str, method: Method, settings: Settings) -> dict[str, Any]:
    return {
        "method": name,
        "kind": method.kind,
        "domains": [entry.partition("=")[0] for entry in settings.domains],
        "seed": settings.seed,
        "settings": {**settings.to_json(), "method": method.settings(), "lr": settings.lr_of(name)},
        "protects": settings.protect is not None and method.protects,
        "versions": versions(),
    }


def run_record(name: str, method: Method, settings: Settings, progress: Progress) -> dict[str, Any]:
    """A method's run.

    `summary` has the numbers for bits per byte, which every domain has, and under `by_metric` those of every
    metric. `R` may hold null where a domain has no record of a metric's kind; `R_reference` is the bits per byte
    of the reference text at each stage and `drift` KL(base ‖ model) there, nats a token. `domain_records` has an
    entry a trained domain: its name under `domain`, and what the method reports on it; those that keep an account of
    capacity give under `layers` what `sparse_cl.probes.capacity.Layers` says. `protects`: whether a text was given to
    protect and the method did. `state_bytes`: the largest state of optimizer and method. What `CLOCKED` names goes to
    costs.json: `seconds`, training without scoring; `step_seconds`, the median optimizer step, null where there were
    too few; `peak_memory_bytes`, of training.
    """
    R = {metric: [[scores[metric] for scores in stage.domains] for stage in progress.stages] for metric in METRICS}
    R = {metric: rows for metric, rows in R.items() if any(value is not None for value in rows[0])}
    by_metric = {metric: summarize(rows, lower_is_better=metric in LOWER_IS_BETTER) for metric, rows in R.items()}
    if method.separate:
        by_metric = {metric: of_separate_models(summary) for metric, summary in by_metric.items()}
    steps = [seconds for seconds in progress.step_seconds if seconds is not None]
    return {
        **_header(name, method, settings),
        "R": R,
        "R_reference": [stage.reference for stage in progress.stages],
        "drift": [stage.drift for stage in progress.stages],
        "summary": {**by_metric[METRICS[0]], "by_metric": by_metric},
        "state_bytes": progress.state_bytes,
        "losses": progress.losses,
        "domain_records": progress.domain_records,
        "seconds": progress.seconds,
        "step_seconds": statistics.median(steps) if steps else None,
        "peak_memory_bytes": progress.peak_memory_bytes,
    }


def failed_record(name: str, method: Method, settings: Settings, error: Exception) -> dict[str, Any]:
    """A method's run that an error ended; the error's words are under `failed`."""
    return {**_header(name, method, settings), "failed": f"{type(error).__name__}: {error}".strip()}


def completed(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs that did not fail."""
    return [run for run in runs if "failed" not in run]


def add_intransigence(runs: Sequence[dict[str, Any]]) -> None:
    """Where the runs, of one order and seed, have the bound `single`, how much less than it each method learned."""
    done = completed(runs)
    single = next((run["R"] for run in done if run["method"] == "single"), None)
    if single is None:
        return
    for run in done:
        summary = run["summary"]
        for metric, rows in run["R"].items():
            value = intransigence(rows, single[metric], lower_is_better=metric in LOWER_IS_BETTER)
            summary["by_metric"][metric]["intransigence"] = value
        summary["intransigence"] = summary["by_metric"][METRICS[0]]["intransigence"]


def write_runs(out: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Write both files; results.json last, so that a run that has it is finished."""
    costs = [{name: run[name] for name in ("method", *CLOCKED) if name in run} for run in runs]
    write_json(out / COSTS, {"runs": costs})
    kept = [{name: value for name, value in run.items() if name not in CLOCKED} for run in runs]
    write_json(out / RESULTS, {"runs": kept})


def read_runs(out: Path) -> list[dict[str, Any]]:
    """The runs of a folder, both files together. Costs that are not there are None.

    Raises:
        ValueError: results.json is none of `sparse-cl run`, or cannot be read.
    """
    path = out / RESULTS
    try:
        runs = read_json(path)["runs"]
        costs = read_json(out / COSTS)["runs"] if (out / COSTS).is_file() else []
        by_method = {entry["method"]: entry for entry in costs}
        missing = dict.fromkeys(CLOCKED)
        return [{**missing, **run, **by_method.get(run["method"], {})} for run in runs]
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not what sparse-cl run writes ({type(error).__name__}: {error})") from error
