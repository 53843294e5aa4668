"""What a step hands to the op, gathered once and used until something changes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sparse_cl.layout import state_dtype

from .leaf import weight_of
from .state import ParameterState, compact


@dataclass
class Plan:
    """One call of the op."""

    own: list[Tensor]  # parameters of the optimizer
    params: list[Tensor]  # what the op writes: the same, but for leaves the weights that they stand for
    positions: list[int]  # in group["params"]
    buffers: list[Tensor]
    layout: Tensor
    facts: list[tuple]  # what gradients must look like, see facts_of
    projected: Any = None  # what a projected step has made for this call

    def written(self) -> list[Tensor]:
        """All tensors that a step changes: ops write behind autograd's back, and must say so to it."""
        return [*self.params, *(p for p, w in zip(self.own, self.params, strict=True) if p is not w)]


@dataclass
class LeafPlan:
    """A leaf, the weight that it stands for, and the state by which both are stepped."""

    leaf: Tensor
    weight: Tensor
    packed: ParameterState

    def holds(self) -> bool:
        """Whether the leaf still stands for this weight, and lies where the op steps it."""
        if weight_of(self.leaf) is not self.weight:
            return False
        return not self.packed.is_leaf(self.leaf) or self.leaf.data_ptr() == self.packed.views["master"].data_ptr()

    def follow(self) -> None:
        """Sets a leaf that is no master to what has been written into the weight."""
        if not self.packed.is_leaf(self.leaf):
            self.leaf.copy_(compact(self.weight, self.packed.layout, self.packed.views))


@dataclass
class GroupPlan:
    """The calls of a parameter group, and what they hold for."""

    key: tuple
    with_grad: list[bool]
    state_ids: list[int]
    state_dicts: list[dict[str, Tensor]]
    dict_ids: list[int]
    plans: list[Plan]
    leaves: list[LeafPlan]


def facts_of(grads: list[Tensor]) -> list[tuple]:
    """Shape, dtype and device of each gradient."""
    return [(g.shape, g.dtype, g.device) for g in grads]


def ids_of(dicts: list[dict[str, Tensor]]) -> list[int]:
    """Identities of all values; in one C loop, since every step compares them."""
    return list(map(id, chain.from_iterable(map(dict.values, dicts))))


def fault_of(weight: Tensor, grad: Tensor, packed: ParameterState) -> str | None:
    """What keeps a step of ``weight`` from being taken, in words; None if nothing does."""
    layout, dtype, device = packed.layout, weight.dtype, weight.device
    shape = layout.grad_shape if layout.compact_grad else weight.shape
    if grad.shape != torch.Size(shape):
        return f"its gradient has shape {tuple(grad.shape)}, expected {tuple(shape)}"
    if grad.device != device:
        return f"its gradient is on {grad.device}, expected {device}"
    if grad.dtype not in (dtype, torch.float32):
        return f"its gradient is {grad.dtype}, expected {dtype} or torch.float32"
    if packed.buffer.device != device:
        return f"its state is on {packed.buffer.device}, expected {device}"
    if layout.shape != weight.shape or layout.dtype != state_dtype(dtype):
        return f"its state was made for shape {layout.shape} and {layout.dtype} moments"
    return None


def scalar_on(value: Tensor | None, device: torch.device) -> Tensor | None:
    """``value`` in float32 where a parameter is; on the CPU it has arrived when this returns."""
    if value is None:
        return None
    return value.to(device=device, dtype=torch.float32, non_blocking=device.type != "cpu")
