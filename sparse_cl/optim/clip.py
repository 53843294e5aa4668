"""Gradient clipping that sees active entries only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_cl.masks import Mask
from sparse_cl.optim.state import write_flat


def clip_active_(grads: Sequence[tuple[Tensor, Mask | None]], max_norm: float) -> Tensor:
    """Scales the active entries of gradients in place so that their joint 2-norm is at most ``max_norm``.

    Args:
        grads: gradients, at least one, each with its parameter's mask; without one all entries are active.

    Returns:
        The norm before scaling, a 0-d tensor on the device of the first gradient.
    """
    device = grads[0][0].device
    picked = [_pick(grad, mask) for grad, mask in grads]
    norms = [torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in picked]
    norm = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for (grad, mask), values in zip(grads, picked, strict=True):
        _put(grad, mask, values.mul_(factor.to(grad.device)))
    return norm


def _pick(grad: Tensor, mask: Mask | None) -> Tensor:
    if mask is None:
        return grad
    return grad.reshape(-1)[mask.to(grad.device).positions()]


def _put(grad: Tensor, mask: Mask | None, values: Tensor) -> None:
    if mask is None:
        return
    write_flat(grad, mask.to(grad.device).positions(), values)
