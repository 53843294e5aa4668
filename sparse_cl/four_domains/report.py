"""What a run hands over: results.json and the printed comparison."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_cl.probes.capacity import scarcity

from .evaluate import METRICS
from .metrics import FORMULAS, LOWER_IS_BETTER, summarize
from .sequence import Progress, matrix
from .settings import Settings

COLUMNS = ("learning_accuracy", "acc", "learned", "forgetting", "bwt", "fwt", "gain_lost")
UNITS = {"bits_per_byte": "bits/byte, lower is better", "accuracy": "part right", "exact_match": "part right"}


def run_record(
    method: str,
    method_settings: dict[str, Any],
    settings: Settings,
    progress: Progress,
    versions: dict[str, str],
) -> dict[str, Any]:
    """One entry of `runs` in results.json.

    `summary` has the numbers for bits per byte, which every domain has, and under `by_metric` those of every
    metric. `R` may hold null where a domain has no record of a metric's kind; `R_reference` is the bits per byte
    of the reference text at each stage. `seconds` is training, scoring left out; `state_bytes` the optimizer's
    largest state. `domain_records` has an entry a domain: its name under `domain`, and what the method reports on it;
    methods that protect subspaces give under `layers` what `sparse_cl.probes.capacity.Layers` says.
    """
    R = {metric: matrix(progress.stages, metric) for metric in METRICS}
    R = {metric: rows for metric, rows in R.items() if any(value is not None for value in rows[0])}
    by_metric = {metric: summarize(rows, lower_is_better=metric in LOWER_IS_BETTER) for metric, rows in R.items()}
    return {
        "method": method,
        "domains": [entry.partition("=")[0] for entry in settings.domains],
        "seed": settings.seed,
        "settings": {**settings.to_json(), "method": method_settings, "lr": settings.lr_of(method)},
        "versions": versions,
        "R": R,
        "R_reference": [stage.reference for stage in progress.stages],
        "summary": {**by_metric["bits_per_byte"], "by_metric": by_metric},
        "seconds": progress.seconds,
        "peak_memory_bytes": progress.peak_memory_bytes,
        "state_bytes": progress.state_bytes,
        "losses": progress.losses,
        "domain_records": progress.domain_records,
    }


def write_json(path: Path, data: Any) -> None:
    """Write whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def number(value: float | None) -> str:
    """Three decimals; a dash for what is not known."""
    return "-" if value is None else f"{value:.3f}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns as wide as they need: the first one to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def runs_with_capacity(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs whose method reports the capacity of each layer."""
    return [run for run in runs if any("layers" in record for record in run["domain_records"])]


def _capacity(runs: Sequence[dict[str, Any]]) -> str:
    """Capacity, surviving gradient and leak of the runs, and a warning a domain in which little survives."""
    rows, warnings = [], []
    for run in runs:
        records = run["domain_records"]
        used = [[layer["used"] / layer["width"] for layer in record["layers"].values()] for record in records]
        surviving = [layer["surviving"] for record in records for layer in record["layers"].values()]
        leaks = [layer["leak"] for record in records for layer in record["layers"].values()]
        leaks = [leak for leak in leaks if leak is not None]
        rows.append(
            [
                run["method"],
                *(number(sum(shares) / len(shares)) for shares in used),
                number(min(surviving)),
                f"{max(leaks):.1e}" if leaks else "-",
            ]
        )
        for record in records:
            if warning := scarcity(record["layers"]):
                warnings.append(f"Warning: {run['method']}, before {record['domain']}: {warning}")
    header = ("method", *(f"after {domain}" for domain in runs[0]["domains"]), "least surviving", "largest leak")
    title = (
        "capacity: share of the input directions that is used, mean over layers; the least share of a new domain's\n"
        "gradient that survives in a layer; the largest share of a layer's change that lies in protected directions"
    )
    return "\n".join([title, text_table(header, rows), *warnings])


def comparison(runs: Sequence[dict[str, Any]]) -> str:
    """The runs side by side, a table a metric, with the formula of every column."""
    parts = []
    for metric in METRICS:
        having = [run for run in runs if metric in run["R"]]
        if not having:
            continue
        rows = [[run["method"], *(number(run["summary"]["by_metric"][metric][c]) for c in COLUMNS)] for run in having]
        base = [number(value) for value in having[0]["R"][metric][0]]
        shown = ", ".join(f"{d} {v}" for d, v in zip(having[0]["domains"], base, strict=True) if v != "-")
        parts.append(f"{metric} ({UNITS[metric]}); base model: {shown}\n" + text_table(("method", *COLUMNS), rows))
    rows = [
        [
            run["method"],
            *(number(run["R_reference"][i]) for i in (0, -1)),
            f"{run['seconds']:.1f}",
            f"{run['state_bytes'] / 1e6:.2f}",
            f"{run['peak_memory_bytes'] / 1e6:.0f}",
            f"{run['settings']['lr']:g}",
        ]
        for run in runs
    ]
    header = ("method", "reference before", "after (bits/byte)", "training s", "state MB", "peak MB", "lr")
    parts.append(text_table(header, rows))
    if protecting := runs_with_capacity(runs):
        parts.append(_capacity(protecting))
    formulas = "\n".join(f"  {name:18} {FORMULAS[name]}" for name in COLUMNS)
    parts.append(
        "R[i][j]: score on domain j after training domain i; row 0 is the base model; T domains.\n"
        f"{formulas}\n"
        "For bits per byte differences are turned: positive forgetting always means worse, positive learned,\n"
        "bwt and fwt better. Little forgetting next to little learned says nothing: compare both."
    )
    return "\n\n".join(parts)
