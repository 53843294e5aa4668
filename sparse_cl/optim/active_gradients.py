"""Gradients that are zero outside the masks, so that whoever clips them counts what is trained."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from sparse_cl.layout import is_sharded
from sparse_cl.masks import ColumnMask, Mask, RowMask

from .names import parameters_of
from .sparse_masked_adamw import SparseMaskedAdamW


def active_gradients(optimizer: torch.optim.Optimizer) -> ExitStack:
    """Has gradients of masked parameters be zero outside their masks, from the next backward pass until it is closed.

    Trainers clip by the norm of all gradients (``torch.nn.utils.clip_grad_norm_``). Frozen entries would count there,
    though nobody steps them, and shrink the step of the active ones. A loop of your own calls
    ``optimizer.clip_grad_norm_`` instead, which costs less. Masks may change in between. Nothing happens for an
    optimizer without masks.

    Args:
        optimizer: any; wrappers are not looked through.

    Raises:
        ValueError: a masked parameter is split over processes, whose gradients call no hooks.
    """
    if not isinstance(optimizer, SparseMaskedAdamW):
        return ExitStack()
    if any(is_sharded(param) for param in optimizer._store.masks):
        raise ValueError("masks: of parameters that fully_shard has split; clip by optimizer.clip_grad_norm_")

    #: By parameter its mask, and what that freezes, beside the parameter.
    frozen: dict[Tensor, tuple[Mask, Mask]] = {}

    @torch.no_grad()
    def cut(param: Tensor) -> None:
        mask = optimizer._store.mask_of(param)
        if mask is None or param.grad is None or param.grad.shape != mask.shape:
            return
        if param not in frozen or frozen[param][0] is not mask:
            frozen[param] = mask, (~mask).to(param.device)
        _, rest = frozen[param]
        if isinstance(rest, RowMask | ColumnMask):
            param.grad.index_fill_(0 if isinstance(rest, RowMask) else 1, rest.index.long(), 0)
        else:
            param.grad.masked_fill_(rest.to_dense(), 0)

    handles = ExitStack()
    for param in parameters_of(optimizer.param_groups):
        if param.requires_grad and param.is_leaf:
            handles.callback(param.register_post_accumulate_grad_hook(cut).remove)
    return handles
