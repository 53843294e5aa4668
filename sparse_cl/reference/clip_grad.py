"""active_norm and scale_active_ in plain PyTorch: what clipping does to the active entries of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_cl.layout import COLUMNS, DENSE, FIELDS, INDEX_NAME, ROWS, StateLayout

from .masked_adamw import active_positions, check_state, requirement, rows_of


def active_norm(grads: Sequence[Tensor], states: Sequence[Tensor], layout: Tensor) -> Tensor:
    """The joint 2-norm of the active entries of gradients.

    Args:
        grads: float32, bfloat16, float16 or float64, each of its parameter's shape or, where ``layout`` says so, of
            the compact shape; all on one device.
        states: uint8 buffers laid out as :class:`~sparse_cl.layout.StateLayout` says, on the gradients' device. Only
            their index is read.
        layout: int64, one row of ``layout.FIELDS`` a gradient, on the CPU.

    Returns:
        0-d, on the gradients' device: float64 if any gradient is, else float32. 0 where no entry is active.
    """
    chosen = _check("active_norm", grads, states, layout)
    dtype = norm_dtype(grads)
    norms = [
        torch.linalg.vector_norm(_take(grad, positions), dtype=torch.promote_types(grad.dtype, torch.float32)).to(dtype)
        for grad, positions in zip(grads, chosen, strict=True)
    ]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), dtype=dtype)


def scale_active_(grads: Sequence[Tensor], states: Sequence[Tensor], layout: Tensor, factor: Tensor) -> None:
    """Multiplies the active entries of gradients by ``factor``, in place; all other bits stay.

    Args:
        grads, states, layout: as for :func:`active_norm`.
        factor: one element, float32 or float64, on the gradients' device. 1 changes nothing.

    Products are computed in float32 (float64 for float64 gradients) and rounded once.
    """
    if factor.numel() != 1 or factor.dtype not in (torch.float32, torch.float64):
        raise RuntimeError("scale_active_: factor: expected one element of float32 or float64")
    if grads and factor.device != grads[0].device:
        raise RuntimeError("scale_active_: factor: expected it on the gradients' device")
    chosen = _check("scale_active_", grads, states, layout)
    for grad, positions in zip(grads, chosen, strict=True):
        wide = _take(grad, positions).to(torch.promote_types(grad.dtype, torch.float32))
        values = (wide * factor.to(wide.dtype).view(())).to(grad.dtype)
        if positions is None:
            grad.copy_(values)
        elif grad.is_contiguous():
            grad.view(-1).index_copy_(0, positions, values)
        else:
            grad.copy_(grad.reshape(-1).index_copy(0, positions, values).view(grad.shape))


def norm_dtype(grads: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the norm of ``grads``."""
    return torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32


def _take(grad: Tensor, positions: Tensor | None) -> Tensor:
    return grad if positions is None else grad.reshape(-1)[positions]


def _check(op: str, grads: Sequence[Tensor], states: Sequence[Tensor], layout: Tensor) -> list[Tensor | None]:
    """The active positions of each gradient, None for all, after everything that could fail."""
    require, count = requirement(op), len(grads)
    require(len(states) == count, f"expected as many states as grads ({count})")
    chosen: list[Tensor | None] = []
    for i, (grad, state, row) in enumerate(zip(grads, states, rows_of(layout, count, require), strict=True)):
        require(grads[0].device == grad.device == state.device, f"grads[{i}] and its state: expected all on one device")
        check_state(i, state, require)
        require(grad.dtype.is_floating_point, f"grads[{i}]: expected float32, bfloat16, float16 or float64")
        field = dict(zip(FIELDS, row, strict=True))
        if field["compact_grad"] == 1:
            require(_is_compact(grad, field), f"grads[{i}]: expected the compact shape that layout[{i}] says")
            chosen.append(None)
            continue
        where = StateLayout.from_row(row, grad.shape, grad.dtype)
        made = where.is_valid() and field["numel"] == where.numel and field["inner"] == where.inner
        require(made, f"layout[{i}]: not a row that StateLayout.row() makes for grads[{i}]")
        if where.kind == DENSE or where.entries == 0:
            chosen.append(None if where.kind == DENSE else torch.empty(0, dtype=torch.int64, device=grad.device))
            continue
        # The index lies where it does whatever the dtype of the moments, which a gradient does not tell.
        offset, shape, dtype = where.sections()["index"]
        end = offset + shape[0] * dtype.itemsize
        fits = field["index_offset"] == offset and end <= state.numel()
        require(fits, f"states[{i}]: does not hold what layout[{i}] says")
        index = state[offset:end].view(dtype)
        chosen.append(active_positions(where, {INDEX_NAME[where.kind]: index}, grad.device))
    return chosen


def _is_compact(grad: Tensor, field: dict[str, int]) -> bool:
    if field["kind"] == ROWS:
        return grad.dim() >= 1 and len(grad) == field["units"] and grad.numel() == field["units"] * field["inner"]
    if field["kind"] != COLUMNS or grad.dim() != 2:
        return False
    return grad.shape[1] == field["units"] and grad.shape[0] * field["inner"] == field["numel"]
