"""What a step hands to the op, gathered once and used until something changes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from torch import Tensor


@dataclass
class Plan:
    """One call of the op."""

    params: list[Tensor]
    positions: list[int]  # in group["params"]
    buffers: list[Tensor]
    layout: Tensor
    facts: list[tuple]  # what gradients must look like, see facts_of


@dataclass
class GroupPlan:
    """The calls of a parameter group, and what they hold for."""

    key: tuple
    with_grad: list[bool]
    state_ids: list[int]
    state_dicts: list[dict[str, Tensor]]
    dict_ids: list[int]
    plans: list[Plan]


def facts_of(grads: list[Tensor]) -> list[tuple]:
    """Shape, dtype and device of each gradient."""
    return [(g.shape, g.dtype, g.device) for g in grads]


def ids_of(dicts: list[dict[str, Tensor]]) -> list[int]:
    """Identities of all values; in one C loop, since every step compares them."""
    return list(map(id, chain.from_iterable(map(dict.values, dicts))))
