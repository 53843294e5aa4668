"""Gradient clipping that sees active entries only."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sparse_cl import ops

from .plan import Plan


def clip_active_(calls: Iterable[tuple[list[Tensor], Plan]], max_norm: float) -> Tensor:
    """Scales the active entries of gradients in place so that their joint 2-norm is at most ``max_norm``.

    Args:
        calls: gradients, each list with the plan of their step.

    Returns:
        The norm before scaling, a 0-d tensor on the device of the first gradient; 0 on the CPU if there is none.
    """
    by_device: dict[torch.device, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
    for grads, plan in calls:
        of_device = by_device.setdefault(grads[0].device, ([], [], []))
        for found, more in zip(of_device, (grads, plan.buffers, [plan.layout]), strict=True):
            found += more
    if not by_device:
        return torch.tensor(0.0)
    of_devices = [(grads, buffers, torch.cat(layouts)) for grads, buffers, layouts in by_device.values()]
    norms = [ops.active_norm(*arguments) for arguments in of_devices]
    norm = norms[0]
    if len(norms) > 1:
        norm = torch.linalg.vector_norm(torch.stack([_on(n, norm.device) for n in norms]))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for device, arguments in zip(by_device, of_devices, strict=True):
        ops.scale_active_(*arguments, _on(factor, device))
        increment_version(arguments[0])  # the op writes behind autograd's back
    return norm


def _on(scalar: Tensor, device: torch.device) -> Tensor:
    """``scalar`` on a device; on the CPU it has arrived when this returns."""
    return scalar.to(device, non_blocking=device.type != "cpu")
