"""What a step hands to the op, gathered once and used until something changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_cl.layout import is_sharded, state_dtype

from .leaf import owner_of, split_owner_of, weight_of
from .names import Groups, name_of, parameters_of
from .shards import piece_of
from .state import ParameterState


class Plan:
    """One call of the op.

    Attributes:
        own: parameters of the optimizer.
        params: what the op writes: the same, but for a leaf the weight that it stands for, and of what is split over
            processes, leaves too, this one's part.
        positions: where they are in the group's list.
        packed, buffers: their states.
        layout: the op's int64 table, on the CPU.
        facts: what gradients must look like, see :func:`facts_of`.
        shared: the places of parameters, by what holds the other parts of them: a mesh and its dimensions, or None.
        empty: the step counts of parameters of which this process holds no active entry.
        projected: what a projected step has made for this call.
    """

    def __init__(self, own: list[Tensor], positions: list[int], packed: list[ParameterState], grads: list[Tensor]):
        self.own, self.positions, self.packed = own, positions, packed
        self.params = [weight_of(param) for param in own]
        self.buffers = [state.buffer for state in packed]
        self.layout = torch.tensor([state.layout.row() for state in packed], dtype=torch.int64, device="cpu")
        self.facts = facts_of(grads)
        self.shared: dict[Any, list[int]] = {}
        for i, piece in enumerate(map(piece_of, own)):
            self.shared.setdefault(None if piece is None or not piece.dims else piece.shared, []).append(i)
        # Ops count no steps where they write nothing, while other processes have entries of the same parameter.
        self.empty = [state.views["step"] for state in packed if state.layout.entries == 0]
        self.projected: Any = None

    def written(self) -> list[Tensor]:
        """All tensors that a step changes: ops write behind autograd's back, and must say so to it."""
        return [*self.params, *(p for p, w in zip(self.own, self.params, strict=True) if p is not w)]

    def explain(self, grads: Sequence[Tensor], groups: Groups, cause: Exception | None = None) -> None:
        """Raises a ValueError that names the first parameter that cannot be stepped, if there is one."""
        for param, weight, grad, packed in zip(self.own, self.params, grads, self.packed, strict=True):
            if fault := fault_of_leaf(param) or fault_of(weight, grad, packed):
                raise ValueError(f"parameter {name_of(groups, param)}: {fault}") from cause

    def check(self, grads: Sequence[Tensor], groups: Groups) -> None:
        """As :meth:`explain`, but looks only where the gradients are not like those of before."""
        if facts_of(grads) != self.facts:
            self.explain(grads, groups)

    def leaves(self) -> list[LeafPlan]:
        parts = zip(self.own, self.params, self.packed, strict=True)
        return [LeafPlan(param, weight, packed) for param, weight, packed in parts if owner_of(param) is not None]


class Call(NamedTuple):
    """A plan with the group's hyperparameters and the gradients of one step."""

    group: dict[str, Any]
    plan: Plan
    grads: list[Tensor]


@dataclass
class LeafPlan:
    """A leaf, the weight that it stands for, and the state by which both are stepped."""

    leaf: Tensor
    weight: Tensor
    packed: ParameterState

    def holds(self) -> bool:
        """Whether the leaf still stands for this weight, and lies where the op steps it."""
        if is_sharded(self.leaf):
            return fault_of_leaf(self.leaf) is None
        if weight_of(self.leaf) is not self.weight:
            return False
        return not self.packed.is_leaf(self.leaf) or self.leaf.data_ptr() == self.packed.views["master"].data_ptr()

    def follow(self) -> None:
        """Sets a leaf that is not the master to what has been written into the weight; of a split one it is the other
        way round. All processes must call it."""
        if (owner := split_owner_of(self.leaf)) is not None:
            owner.write_back()
        elif not self.packed.is_leaf(self.leaf):
            self.leaf.copy_(self.packed.active(self.weight))


class GroupPlan:
    """The calls of a parameter group, and what they hold for.

    Args:
        key: of the group, see :func:`key_of`.
        plans: the calls.
        dicts: ``optimizer.state[p]`` of all their parameters.
    """

    def __init__(self, key: tuple, plans: list[Plan], dicts: list[dict[str, Tensor]]):
        self.key, self.plans, self.dicts = key, plans, dicts
        self.state_ids, self.dict_ids = ids_of(dicts), set(map(id, dicts))
        self.leaves = [leaf for plan in plans for leaf in plan.leaves()]
        pairs = ((param, weight) for plan in plans for param, weight in zip(plan.own, plan.params, strict=True))
        self.pieces = [(param, weight) for param, weight in pairs if is_sharded(param)]

    def holds(self, key: tuple, shown: set[int]) -> bool:
        """Whether nothing has changed, if ``shown`` are the identities of the dicts that the optimizer shows now."""
        return (
            self.key == key
            and self.state_ids == ids_of(self.dicts)
            and self.dict_ids <= shown
            and all(leaf.holds() for leaf in self.leaves)
            and all(weight_of(param) is weight for param, weight in self.pieces)
        )


def key_of(group: dict[str, Any], grads: Sequence[Tensor | None]) -> tuple:
    """What a plan depends on: options of the state, which parameters there are, and which of them have gradients."""
    # Parameters too, since some tools put others into a group's list.
    options = group["amsgrad"], group["master_weights"], group["second_moment"]
    params = [(id(param), param.dtype) for param in group["params"]]
    return options, params, [g is not None for g in grads]


def facts_of(grads: Iterable[Tensor]) -> list[tuple]:
    """Shape, dtype and device of each gradient."""
    return [(g.shape, g.dtype, g.device) for g in grads]


def ids_of(dicts: Iterable[dict[str, Tensor]]) -> list[int]:
    """Identities of all values; in one C loop, since every step compares them."""
    return list(map(id, chain.from_iterable(map(dict.values, dicts))))


def fault_of_leaf(param: Tensor) -> str | None:
    """Why the layer of a split leaf cannot be written to, in words; None if it can, or if ``param`` is no such leaf."""
    owner = split_owner_of(param)
    if owner is None or owner.active is param:
        return None
    return "its layer is gathered, as after a pass without gradients; call model.reshard() before the step"


def fault_of(weight: Tensor, grad: Tensor, packed: ParameterState) -> str | None:
    """Why ``weight`` cannot be stepped, in words; None if it can."""
    layout, dtype, device = packed.layout, weight.dtype, weight.device
    shape = layout.grad_shape if layout.compact_grad else weight.shape
    if grad.shape != torch.Size(shape):
        return f"its gradient has shape {tuple(grad.shape)}, expected {tuple(shape)}"
    if grad.device != device:
        return f"its gradient is on {grad.device}, expected {device}"
    if grad.dtype not in (dtype, torch.float32):
        return f"its gradient is {grad.dtype}, expected {' or '.join(dict.fromkeys(map(str, (dtype, torch.float32))))}"
    if packed.buffer.device != device:
        return f"its state is on {packed.buffer.device}, expected {device}"
    if layout.shape != weight.shape or layout.dtype != state_dtype(dtype):
        return f"its state was made for shape {layout.shape} and {layout.dtype} moments"
    return None


def refuse_sparse(groups: Groups) -> None:
    """Raises a RuntimeError that names the first parameter whose gradient is not dense."""
    for param in parameters_of(groups):
        if param.grad is not None and param.grad.layout is not torch.strided:
            raise RuntimeError(
                f"parameter {name_of(groups, param)}: SparseMaskedAdamW takes dense gradients, got "
                f"{param.grad.layout}; use sparse=False in the embedding"
            )


def scalar_on(value: Tensor | None, device: torch.device) -> Tensor | None:
    """``value`` in float32 where a parameter is; on the CPU it has arrived when this returns."""
    if value is None:
        return None
    return value.to(device=device, dtype=torch.float32, non_blocking=device.type != "cpu")
