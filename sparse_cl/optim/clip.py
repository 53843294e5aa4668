"""Gradient clipping that sees active entries only."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sparse_cl import ops

from .plan import Plan
from .shards import added


def clip_active_(calls: Iterable[tuple[list[Tensor], Plan]], max_norm: float) -> Tensor:
    """Scales the active entries of gradients in place so that their joint 2-norm is at most ``max_norm``.

    Args:
        calls: gradients, each list with the plan of their step.

    Returns:
        The norm before scaling, a 0-d tensor on the device of the first gradient; 0 on the CPU if there is none.
    """
    found: dict[tuple, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
    for grads, plan in calls:
        for shared, places in plan.shared.items():
            # One device, and one set of processes that hold other parts.
            of_key = found.setdefault((grads[0].device, shared), ([], [], []))
            whole = len(places) == len(grads)
            of_key[0].extend(grads if whole else [grads[i] for i in places])
            of_key[1].extend(plan.buffers if whole else [plan.buffers[i] for i in places])
            of_key[2].append(plan.layout if whole else plan.layout[places])
    if not found:
        return torch.tensor(0.0, device="cpu")
    arguments = {key: (grads, buffers, torch.cat(layouts)) for key, (grads, buffers, layouts) in found.items()}
    norms = []
    for (_, shared), its in arguments.items():
        norm = ops.active_norm(*its)
        norms.append(norm if shared is None else added(norm.double().square(), *shared).sqrt().to(norm.dtype))
    norm = norms[0]
    if len(norms) > 1:
        norm = torch.linalg.vector_norm(torch.stack([_on(n, norm.device) for n in norms]))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for (device, _), its in arguments.items():
        ops.scale_active_(*its, _on(factor, device))
        increment_version(its[0])  # the op writes behind autograd's back
    return norm


def _on(scalar: Tensor, device: torch.device) -> Tensor:
    """``scalar`` on a device; on the CPU it has arrived when this returns."""
    return scalar.to(device, non_blocking=device.type != "cpu")
