"""The printed comparison of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparse_cl.probes.capacity import scarcity

from .evaluate import METRICS
from .metrics import FORMULAS
from .results import completed
from .verdict import COSTS, Outcome, verdict

COLUMNS = ("learning_accuracy", "acc", "learned", "forgetting", "bwt", "fwt", "gain_lost")
UNITS = {"bits_per_byte": "bits/byte, lower is better", "accuracy": "part right", "exact_match": "part right"}
IN_MEGABYTES, IN_MILLISECONDS = 1e-6, 1e3


def number(value: float | None, decimals: int = 3, scale: float = 1.0) -> str:
    """A number with so many decimals; a dash for what is not known."""
    return "-" if value is None else f"{value * scale:.{decimals}f}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns as wide as they need: the first one to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def runs_with_capacity(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs whose method reports the capacity of each layer, after every domain."""
    return [
        run
        for run in runs
        if [record["domain"] for record in run["domain_records"] if record.get("layers")] == run["domains"]
    ]


def _capacity(runs: Sequence[dict[str, Any]]) -> str:
    """Capacity, surviving gradient and leak of the runs, and a warning a domain in which little survives."""
    rows, warnings = [], []
    for run in runs:
        records = run["domain_records"]
        used = [[layer["used"] / layer["width"] for layer in record["layers"].values()] for record in records]
        layers = [layer for record in records for layer in record["layers"].values()]
        surviving, leaks = (
            [layer[key] for layer in layers if layer.get(key) is not None] for key in ("surviving", "leak")
        )
        rows.append(
            [
                run["method"],
                *(number(sum(shares) / len(shares)) for shares in used),
                number(min(surviving, default=None)),
                f"{max(leaks):.1e}" if leaks else "-",
            ]
        )
        for record in records:
            if warning := scarcity(record["layers"]):
                warnings.append(f"Warning: {run['method']}, before {record['domain']}: {warning}")
    header = ("method", *(f"after {domain}" for domain in runs[0]["domains"]), "least surviving", "largest leak")
    title = (
        "capacity: share of the input directions (or neurons) that is used, mean over layers; the least share of a\n"
        "new domain's gradient that survives in a layer; the largest share of a layer's change that lies in what is\n"
        "protected"
    )
    return "\n".join([title, text_table(header, rows), *warnings])


def outcome(run: dict[str, Any]) -> Outcome:
    """What the verdict needs of a run."""
    summary = run["summary"]
    return Outcome(
        name=run["method"],
        method=run["method"],
        kind=run["kind"],
        learned=summary["learned"],
        forgetting=summary["forgetting"],
        gain_lost=summary["gain_lost"],
        costs={cost: run[cost] for cost in COSTS},
    )


def _notes(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must know of how the runs were made."""
    settings = runs[0]["settings"]
    notes = []
    if settings["split"] == "validation":
        notes.append("Scored on validation records, which are for choosing settings: no result.")
    if settings["autocast"]:
        notes.append(f"Trained under {settings['autocast']} autocast, scored in float32.")
    if settings["protect"]:
        told: dict[bool, list[str]] = {True: [], False: []}
        for run in runs:
            told[run["protects"]].append(run["method"])
        by = ", ".join(told[True]) or "no method"
        without = f"; without it: {', '.join(told[False])}" if told[False] else ""
        notes.append(f"Text to protect: {settings['protect']}; protected by {by}{without}.")
    return notes


def _costs(runs: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            run["method"],
            *(number(run["R_reference"][i]) for i in (0, -1)),
            number(run["drift"][-1]),
            number(run["step_seconds"], 1, IN_MILLISECONDS),
            number(run["seconds"], 1),
            number(run["state_bytes"], 2, IN_MEGABYTES),
            number(run["peak_memory_bytes"], 0, IN_MEGABYTES),
            f"{run['settings']['lr']:g}",
        ]
        for run in runs
    ]
    header = (
        "method",
        "reference before",
        "after (bits/byte)",
        "KL drift (nats)",
        "step ms",
        "training s",
        "state MB",
        "peak MB",
        "lr",
    )
    return text_table(header, rows)


def comparison(runs: Sequence[dict[str, Any]]) -> str:
    """The answer, then the runs side by side, a table a metric, with the formula of every column."""
    done = completed(runs)
    failures = [f"{run['method']} FAILED: {run['failed'].splitlines()[0]}" for run in runs if "failed" in run]
    head = [*failures, *verdict([outcome(run) for run in done]), *_notes(runs)]
    parts = ["\n".join(head)] if head else []
    if not done:
        return "\n\n".join(parts)
    columns: tuple[str, ...] = COLUMNS
    if any(run["summary"]["intransigence"] is not None for run in done):
        columns = (*COLUMNS, "intransigence")
    for metric in METRICS:
        having = [run for run in done if metric in run["R"]]
        if not having:
            continue
        rows = [[run["method"], *(number(run["summary"]["by_metric"][metric][c]) for c in columns)] for run in having]
        rows += [[run["method"], *("failed" for _ in columns)] for run in runs if "failed" in run]
        base = [number(value) for value in having[0]["R"][metric][0]]
        shown = ", ".join(f"{d} {v}" for d, v in zip(having[0]["domains"], base, strict=True) if v != "-")
        parts.append(f"{metric} ({UNITS[metric]}); base model: {shown}\n" + text_table(("method", *columns), rows))
    parts.append(_costs(done))
    if protecting := runs_with_capacity(done):
        parts.append(_capacity(protecting))
    parts.append(legend(columns))
    return "\n\n".join(parts)


def legend(columns: Sequence[str]) -> str:
    """What the columns mean."""
    formulas = "\n".join(f"  {name:18} {FORMULAS[name]}" for name in columns)
    return (
        "R[i][j]: score on domain j after training domain i; row 0 is the base model; T domains; R_single[j]: a model\n"
        "trained on j alone.\n"
        f"{formulas}\n"
        "For bits per byte differences are turned: positive forgetting always means worse, positive learned,\n"
        "bwt and fwt better. Little forgetting next to little learned says nothing: compare both. KL drift is\n"
        "KL(base || model) of the next token on the reference text, nats a token; step is the median optimizer step."
    )
