"""apply_updates_ in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .masked_adamw import check_call, read_weights, write_weights


def apply_updates_(
    params: Sequence[Tensor],
    states: Sequence[Tensor],
    updates: Sequence[Tensor],
    layout: Tensor,
    found_inf: Tensor | None,
) -> None:
    """Adds an update to the active entries of each parameter, in place: the second half of a step.

    master <- master + update and param <- round(master), or without a master param <- param + update. Half-precision
    parameters without a master are rounded stochastically, with the random bits that ``masked_adamw_`` draws at the
    step counts which the states now have.

    Args:
        params, states, layout: as of :func:`~sparse_cl.reference.masked_adamw_`.
        updates: contiguous tensors in the compact shape of each parameter and the dtype of its state.
        found_inf: one element; unless it is zero, nothing changes.
    """
    layouts = check_call("apply_updates_", params, states, updates, layout, (found_inf,), None)
    if found_inf is not None and bool(found_inf):
        return
    for param, state, update, where in zip(params, states, updates, layouts, strict=True):
        if where.entries:
            view = where.views(state)
            write_weights(param, where, view, read_weights(param, where, view) + update)
