"""A plan as text: what it assumes first, then memory, FLOPs, time and dollars, a column a method."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_cl.four_domains.report import text_table

from .activations import FORMULA
from .cost import Cost, Workload
from .devices import USABLE, Device
from .shapes import ModelShape

_COLUMNS = 6
"""Methods side by side: more are wider than a terminal."""
_MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "state": "optimizer state",
    "temporary": "the step's temporaries",
    "activations": "activations",
    "logits": "logits and loss",
    "bases": "bases of used directions",
    "kept": "else kept by the method",
    "moments": "moments while observing",
    "peak": "peak",
}


def plan_text(shape: ModelShape, work: Workload, device: Device, costs: Sequence[Cost]) -> str:
    """The plan that `sparse-cl plan` prints.

    Args:
        costs: of the same model, workload and device, at least one.
    """
    methods = [cost.method for cost in costs]
    memory = [[title, *(_gigabytes(getattr(cost.memory, name)) for cost in costs)] for name, title in _MEMORY.items()]
    memory.append(["devices needed", *(str(cost.devices or "-") for cost in costs)])
    flops = [
        ["forward, a token", *(f"{cost.demand.forward / 1e9:.4g}" for cost in costs)],
        ["forward and backward, a token", *(f"{cost.token_flops / 1e9:.4g}" for cost in costs)],
        ["projections of updates, a step", *(f"{cost.projection_flops / 1e9:.4g}" for cost in costs)],
    ]
    if any(cost.step_flops for cost in costs):
        flops.append(["projections of gradients, a step", *(f"{cost.step_flops / 1e9:.4g}" for cost in costs)])
    time = [
        ["seconds a step", *(f"{cost.step_seconds:.3g}" for cost in costs)],
        ["steps", *(str(cost.steps) for cost in costs)],
        ["training: device hours", *(_short(cost.device_hours) for cost in costs)],
        ["training: dollars", *(_short(cost.dollars) for cost in costs)],
        ["probing: device hours", *(_short(cost.probe_device_hours) for cost in costs)],
        ["probing: dollars", *(_short(cost.probe_dollars) for cost in costs)],
        ["both: device hours", *(_short(cost.device_hours + cost.probe_device_hours) for cost in costs)],
        ["both: dollars", *(_short(cost.dollars + cost.probe_dollars) for cost in costs)],
    ]
    notes = [f"{cost.method}: {cost.fits}." for cost in costs]
    notes += [f"{cost.method}: {cost.demand.remark}." for cost in costs if cost.demand.remark]
    return "\n\n".join(
        [
            _assumptions(shape, work, device, costs),
            f"Memory in GB (1e9 bytes) on one device of {device.memory / 1e9:.0f} GB\n" + _tables(methods, memory),
            "GFLOPs of matrix products\n" + _tables(methods, flops),
            f"Time and money on {device.name}\n" + _tables(methods, time),
            "\n".join(notes),
        ]
    )


def _tables(methods: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Tables of at most `_COLUMNS` methods each, under one another."""
    starts = range(0, len(methods), _COLUMNS)
    return "\n\n".join(
        text_table(("", *methods[i : i + _COLUMNS]), [[row[0], *row[1 + i : 1 + i + _COLUMNS]] for row in rows])
        for i in starts
    )


def _assumptions(shape: ModelShape, work: Workload, device: Device, costs: Sequence[Cost]) -> str:
    peak = device.flops_fp32 if work.precision == "fp32" else device.flops
    settings = "; ".join(
        f"{cost.method} {', '.join(f'{k} {v}' for k, v in cost.demand.settings.items())}"
        for cost in costs
        if cost.demand.settings
    )
    kept = "each block's input, one block computed again" if work.checkpointing else "all that blocks keep"
    lines = [
        f"Model: {shape.name}: {_millions(shape.parameters)} parameters in {len(shape.blocks)} blocks; each "
        f"token meets {_millions(shape.multiplied)} weights, the head's included",
        f"Run: {work.domains} domains of {work.tokens / 1e6:.4g} M tokens each, repetitions counted; steps of "
        f"{work.batch_size} sequences of {work.length} tokens on a device; precision {work.precision}",
        *([f"Settings: {settings}"] if settings else []),
        f"Device: {device.name}: {peak / 1e12:.4g} TFLOP/s at its peak ({device.flops_fp32 / 1e12:.4g} in float32, for "
        f"projections), {device.bandwidth / 1e9:.4g} GB/s, {device.memory / 1e9:.4g} GB of which {USABLE:.0%} can be "
        f"used ({device.source})",
        f"Assumed: {device.utilization:.0%} of that peak is reached; {device.price:.4g} dollars an hour",
        f"Activations: {kept} ({FORMULA}; after Korthikanti et al. 2022, attention fused)",
        "FLOPs: 2 a weight and token forward, 2 for its input's gradient, 2 for its own; attention over all positions",
    ]
    if any(cost.demand.tracked for cost in costs):
        lines.append(
            f"Protected directions: {work.used:.0%} of each layer's inputs after the last domain, each domain as many, "
            "or as many as max_rank lets a domain add"
        )
    lines += [
        f"Probing: {work.probe_stages} stages of {work.forward_passes} forward and {work.backward_passes} forward and "
        f"backward passes over {work.probe_records} records of each domain, {work.length} tokens each",
        "Left out: loading, scoring, consolidating, communication between devices, and padding",
    ]
    return "\n".join(lines)


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g}" if count else "-"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
