"""Memory, hours and dollars of a sequence of domains by one method on one kind of device, from what was counted."""

from __future__ import annotations

import math
from statistics import mean
from typing import Any

from sparse_cl.models.parts import find_blocks

from .count import AROUND, STEP, Count
from .devices import USABLE, Device
from .model import Workload

MOST_DEVICES = 1024
"""More are not looked for when the state is spread over devices."""


def cost(model: Any, counted: Count, work: Workload, device: Device, gpus: int = 1) -> dict[str, Any]:
    """What a sequence of domains costs.

    Args:
        model: as `build` makes it.
        counted: by `count`, for one method, this work and as many GPUs.
        gpus: over how many the model is split; each takes batches of its own.

    Returns:
        "settings" and "remark", as counted. "memory": bytes on a device that holds everything, or its part of a
        model that is split; "temporary" is what the optimizer's step holds besides, "observing" what is held around a
        domain besides weights and what is kept, "peak" the largest of "phases". Means over the domains:
        "token_flops" (of training, per token; "forward_flops" the forward pass alone), "step_flops" (the optimizer's,
        in float32), "step_bytes" (read and written in a step of training by all but products of matrices),
        "sent_bytes" (by a device to the others), "step_seconds": the longer of "compute_seconds" and "sent_seconds".
        "gpus"; "steps"; "devices" that must share weights, gradients and state (None: no number does, or `gpus` do
        not) and "fits", a sentence on that; "device_hours", "hours" (by the clock), "dollars"; and of all stages of
        probing "probe_flops", "probe_device_hours", "probe_dollars".
    """
    names = ("weights", "gradients", "state", "activations", "logits", "gathered", "kept")
    memory = {name: counted[name] for name in names} | {"phases": counted["peaks"]}
    held = memory["weights"] + memory["kept"]
    memory["temporary"] = max(0, counted["peaks"][STEP] - held - memory["gradients"] - memory["state"])
    memory["observing"] = max(0, counted["peaks"][AROUND] - held)
    memory["peak"] = max(counted["peaks"].values())
    rate = device.utilization * (device.flops_fp32 if work.precision == "fp32" else device.flops)
    passes, step, moved, sent = (mean(counted[key]) for key in ("passes", "steps", "moved", "sent"))
    compute = passes / rate + step / (device.utilization * device.flops_fp32) + moved / device.bandwidth
    sending = sent / device.between(gpus) if gpus > 1 else 0.0
    seconds = max(compute, sending)
    steps = work.domains * math.ceil(work.tokens / (gpus * work.step_tokens))
    devices, fits = _devices(model, memory, device) if gpus == 1 else _split(gpus, memory, device)
    hours = gpus * steps * seconds / 3600
    # A backward pass is taken for two forward passes.
    probe_tokens = work.probe_stages * work.domains * work.probe_records * work.length
    probe_passes = probe_tokens / work.step_tokens * (work.probe_forward + 3 * work.backward_passes)
    probe_hours = probe_passes * (counted["forward"] / rate + counted["forward_moved"] / device.bandwidth) / 3600
    return {
        "settings": counted["settings"],
        "remark": counted["remark"],
        "memory": memory,
        "forward_flops": counted["forward"] / work.step_tokens,
        "token_flops": passes / work.step_tokens,
        "step_flops": step,
        "step_bytes": moved,
        "sent_bytes": sent,
        "compute_seconds": compute,
        "sent_seconds": sending,
        "step_seconds": seconds,
        "gpus": gpus,
        "steps": steps,
        "devices": devices,
        "fits": fits,
        "device_hours": hours,
        "hours": hours / (devices or gpus),
        "dollars": hours * device.price,
        "probe_flops": probe_passes * counted["forward"],
        "probe_device_hours": probe_hours,
        "probe_dollars": probe_hours * device.price,
    }


def _split(gpus: int, memory: dict[str, Any], device: Device) -> tuple[int | None, str]:
    room = USABLE * device.memory
    if memory["peak"] <= room:
        return gpus, f"fits {gpus} devices"
    return None, f"does not fit {gpus} devices: each would hold {memory['peak'] / 1e9:.1f} of {room / 1e9:.1f} GB"


def _devices(model: Any, memory: dict[str, Any], device: Device) -> tuple[int | None, str]:
    room = USABLE * device.memory
    if memory["peak"] <= room:
        return 1, "fits one device"
    # Two of the largest units at a time are whole on every device, the one in use and the next one; a batch and what a
    # method keeps of its own are not spread.
    units = [*(block.module for block in find_blocks(model)), model.get_output_embeddings()]
    whole = 2 * max(sum(p.nbytes for p in unit.parameters()) for unit in units) + memory["kept"]
    batch = memory["activations"] + memory["logits"]
    if whole + batch > room:
        return None, (
            f"does not fit: activations and logits of one batch take {batch / 1e9:.1f} and what is whole on every "
            f"device {whole / 1e9:.1f} of {room / 1e9:.1f} GB; take a smaller --batch-size or --length, "
            "--checkpointing, or a larger device"
        )
    shared = memory["weights"] + memory["state"]
    for count in (2**power for power in range(1, MOST_DEVICES.bit_length())):
        step = (shared + memory["gradients"] + memory["temporary"]) / count
        if whole + max(shared / count + batch, step) <= room:
            return count, f"needs {count} devices that share weights, gradients and state (ZeRO-3, FSDP)"
    return None, f"does not fit {MOST_DEVICES} devices"
