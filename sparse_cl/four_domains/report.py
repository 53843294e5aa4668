"""The printed comparison of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparse_cl.probes.capacity import scarcity

from .evaluate import METRICS
from .metrics import FORMULAS
from .results import completed
from .table import text_table
from .verdict import COSTS, Outcome, verdict

COLUMNS = ("learning_accuracy", "acc", "learned", "forgetting", "bwt", "fwt", "gain_lost")
UNITS = {"bits_per_byte": "bits/byte, lower is better", "accuracy": "part right", "exact_match": "part right"}
IN_MEGABYTES, IN_MILLISECONDS = 1e-6, 1e3


def number(value: float | None, decimals: int = 3, scale: float = 1.0) -> str:
    """A number with so many decimals; a dash for what is not known."""
    return "-" if value is None else f"{value * scale:.{decimals}f}"


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
        used, surviving, leaks = [], [], []
        for record in run["domain_records"]:
            layers = record["layers"].values()
            used.append(sum(layer["used"] / layer["width"] for layer in layers) / len(layers))
            surviving += [layer["surviving"] for layer in layers if layer.get("surviving") is not None]
            leaks += [layer["leak"] for layer in layers if layer.get("leak") is not None]
            if warning := scarcity(record["layers"]):
                warnings.append(f"Warning: {run['method']}, before {record['domain']}: {warning}")
        leak = f"{max(leaks):.1e}" if leaks else "-"
        rows.append([run["method"], *map(number, used), number(min(surviving, default=None)), leak])
    header = ("method", *(f"after {domain}" for domain in runs[0]["domains"]), "least surviving", "largest leak")
    title = (
        "capacity: share of the input directions (or neurons) that is used, mean over layers; the least share of a\n"
        "new domain's gradient that survives in a layer; the largest share of a layer's change that lies in what is\n"
        "protected"
    )
    return "\n".join([title, text_table(header, rows), *warnings])


def outcome(run: dict[str, Any]) -> Outcome:
    """What the verdict needs of a run."""
    scores = {name: run["summary"][name] for name in ("learned", "forgetting", "gain_lost")}
    costs = {cost: run[cost] for cost in COSTS}
    return Outcome(name=run["method"], method=run["method"], kind=run["kind"], costs=costs, **scores)


def _notes(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must know of how the runs were made."""
    settings = runs[0]["settings"]
    notes = []
    if settings["split"] == "validation":
        notes.append("Scored on validation records, which are for choosing settings: no result.")
    if settings["autocast"]:
        notes.append(f"Trained under {settings['autocast']} autocast, scored in float32.")
    if settings["protect"]:
        by = ", ".join(run["method"] for run in runs if run["protects"]) or "no method"
        others = ", ".join(run["method"] for run in runs if not run["protects"])
        without = f"; without it: {others}" if others else ""
        notes.append(f"Text to protect: {settings['protect']}; protected by {by}{without}.")
    return notes


_COSTS = {
    "method": lambda run: run["method"],
    "reference before": lambda run: number(run["R_reference"][0]),
    "after (bits/byte)": lambda run: number(run["R_reference"][-1]),
    "KL drift (nats)": lambda run: number(run["drift"][-1]),
    "step ms": lambda run: number(run["step_seconds"], 1, IN_MILLISECONDS),
    "training s": lambda run: number(run["seconds"], 1),
    "state MB": lambda run: number(run["state_bytes"], 2, IN_MEGABYTES),
    "peak MB": lambda run: number(run["peak_memory_bytes"], 0, IN_MEGABYTES),
    "lr": lambda run: f"{run['settings']['lr']:g}",
}
"""Columns of the last table."""


def comparison(runs: Sequence[dict[str, Any]]) -> str:
    """The answer, then the runs side by side, a table a metric, with the formula of every column."""
    done, failed = completed(runs), [run for run in runs if "failed" in run]
    failures = [f"{run['method']} FAILED: {run['failed'].splitlines()[0]}" for run in failed]
    head = [*failures, *verdict([outcome(run) for run in done]), *_notes(runs)]
    parts = ["\n".join(head)] if head else []
    if not done:
        return "\n\n".join(parts)
    bound = any(run["summary"]["intransigence"] is not None for run in done)
    columns = (*COLUMNS, "intransigence") if bound else COLUMNS
    for metric in METRICS:
        having = [run for run in done if metric in run["R"]]
        if not having:
            continue
        rows = [[run["method"], *(number(run["summary"]["by_metric"][metric][c]) for c in columns)] for run in having]
        rows += [[run["method"], *("failed" for _ in columns)] for run in failed]
        base = [number(value) for value in having[0]["R"][metric][0]]
        shown = ", ".join(f"{d} {v}" for d, v in zip(having[0]["domains"], base, strict=True) if v != "-")
        parts.append(f"{metric} ({UNITS[metric]}); base model: {shown}\n" + text_table(("method", *columns), rows))
    parts.append(text_table(list(_COSTS), [[cell(run) for cell in _COSTS.values()] for run in done]))
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
