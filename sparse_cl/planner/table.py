"""A plan as text: what it assumes first, then memory, FLOPs, time and dollars, a column for each method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_cl.four_domains.table import text_table
from sparse_cl.models.parts import find_blocks

from .devices import USABLE, Device
from .model import Workload

_COLUMNS = 6
"""Methods side by side: more are wider than a terminal."""
_MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "state": "optimizer state",
    "temporary": "the step's temporaries",
    "activations": "activations",
    "logits": "logits and loss",
    "gathered": "gathered weights, at most",
    "kept": "kept by the method",
    "observing": "observing, besides weights and kept",
    "peak": "peak",
}
_FLOPS = {"forward_flops": "forward, per token", "token_flops": "forward and backward, per token"}
_FLOPS |= {"step_flops": "the optimizer's, per step"}
_TIME = {
    "training: device hours": ("device_hours",),
    "training: dollars": ("dollars",),
    "probing: device hours": ("probe_device_hours",),
    "probing: dollars": ("probe_dollars",),
    "both: device hours": ("device_hours", "probe_device_hours"),
    "both: dollars": ("dollars", "probe_dollars"),
}


def plan_text(
    name: str, model: Any, work: Workload, device: Device, costs: Mapping[str, Any], refused: Mapping[str, str]
) -> str:
    """The plan that `sparse-cl plan` prints.

    Args:
        name: the model's.
        costs: by method, what `cost` found. refused: by method, why it is not planned.
    """
    columns, each = list(costs), list(costs.values())
    memory = [[title, *(f"{c['memory'][key] / 1e9:.3g}" for c in each)] for key, title in _MEMORY.items()]
    memory.append(["devices needed", *(str(c["devices"] or "-") for c in each)])
    flops = [[title, *(f"{c[key] / 1e9:.4g}" for c in each)] for key, title in _FLOPS.items()]
    time = [
        ["GB sent per step and GPU", *(f"{c['sent_bytes'] / 1e9:.3g}" for c in each)],
        ["seconds of sending", *(f"{c['sent_seconds']:.3g}" for c in each)],
        ["seconds per step", *(f"{c['step_seconds']:.3g}" for c in each)],
        ["steps", *(str(c["steps"]) for c in each)],
    ]
    time += [[title, *(_short(sum(c[key] for key in keys)) for c in each)] for title, keys in _TIME.items()]
    tables = {
        f"Memory in GB (1e9 bytes) on one device of {device.memory / 1e9:.0f} GB": memory,
        "GFLOPs of matrix products": flops,
        f"Time and money on {device.name}": time,
    }
    notes = [f"{method}: {c['fits']}." for method, c in costs.items()]
    notes += [f"{method}: {c['remark']}." for method, c in costs.items() if c["remark"]]
    notes += [f"{method}: not planned: {why}." for method, why in refused.items()]
    parts = [_assumptions(name, model, work, device, costs)]
    for title, rows in tables.items() if costs else ():
        starts = range(0, len(columns), _COLUMNS)
        shown: list[Any] = [
            [columns[i : i + _COLUMNS], [[r[0], *r[1 + i : 1 + i + _COLUMNS]] for r in rows]] for i in starts
        ]
        parts.append(f"{title}\n" + "\n\n".join(text_table(("", *head), body) for head, body in shown))
    return "\n\n".join([*parts, "\n".join(notes)])


def _assumptions(name: str, model: Any, work: Workload, device: Device, costs: Mapping[str, Any]) -> str:
    peak = device.flops_fp32 if work.precision == "fp32" else device.flops
    chosen = {method: ", ".join(f"{k} {v}" for k, v in c["settings"].items()) for method, c in costs.items()}
    settings = "; ".join(f"{method} {values}" for method, values in chosen.items() if values)
    parameters = sum(p.numel() for p in model.parameters())
    return "\n".join(
        [
            f"Model: {name}: {parameters / 1e6:,.2f} M parameters in {len(find_blocks(model))} blocks"
            + ", planned as float weights, though its configuration says that they are quantized: learn and run refuse "
            "those" * (getattr(model.config, "quantization_config", None) is not None),
            f"Run: {work.domains} domains of {work.tokens / 1e6:.4g} M tokens each, repetitions counted; steps of "
            f"{work.batch_size} sequences of {work.length} tokens on a device; precision {work.precision}",
            *([f"Settings: {settings}"] if settings else []),
            f"Device: {device.name}: {peak / 1e12:.4g} TFLOP/s at its peak ({device.flops_fp32 / 1e12:.4g} in float32, "
            f"for the optimizer), {device.bandwidth / 1e9:.4g} GB/s, {device.memory / 1e9:.4g} GB of which "
            f"{USABLE:.0%} can be used ({device.source})",
            f"Assumed: products of matrices reach {device.utilization:.0%} of that peak, all other ops take as long as "
            f"their bytes at that bandwidth; {device.price:.4g} dollars an hour",
            "Counted: each method's own code, run on tensors without values; attention fused, all its positions counted"
            + "; the activations of a block computed again" * work.checkpointing,
            f"Protected directions: {work.used:.0%} of each layer's inputs after the last domain, each domain as many, "
            "or as many as max_rank lets a layer keep",
            f"Probing: {work.probe_stages} stages of {work.probe_forward} forward and {work.backward_passes} "
            f"forward and backward passes over {work.probe_records} records of each domain, {work.length} tokens each",
            *([split] if (split := _sending(device, costs)) else []),
            "Left out: loading, scoring, the time between domains and what devices exchange in it, and padding",
        ]
    )


def _sending(device: Device, costs: Mapping[str, Any]) -> str:
    counts = sorted({c["gpus"] for c in costs.values() if c["gpus"] > 1})
    rates = ", ".join(f"{device.between(gpus) / 1e9:.4g} GB/s among {gpus}" for gpus in counts)
    return (
        f"Split: by FSDP2, each block and then all else; the first of the processes is run, the others are imagined. A "
        f"GPU sends {rates} ({device.links}), all the while it computes"
        if rates
        else ""
    )


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
