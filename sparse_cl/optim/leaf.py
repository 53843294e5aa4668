"""Compact leaves: parameters that stand for the active rows or columns of a weight."""

from __future__ import annotations

import weakref
from typing import Protocol

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_cl.layout import is_sharded, part
from sparse_cl.masks import ColumnMask, RowMask


class Owner(Protocol):
    """The module of a compact leaf.

    Attributes:
        weight: the whole weight, without a gradient of its own.
        mask: which of its entries the leaf stands for; the leaf has the mask's compact shape.
        active: the leaf.
    """

    @property
    def weight(self) -> Tensor: ...
    @property
    def mask(self) -> RowMask | ColumnMask: ...
    @property
    def active(self) -> Tensor: ...
    def write_back(self) -> None:
        """Writes the leaf, rounded, into the weight."""


# Kept apart from the tensors, since an attribute of a parameter does not survive copies and would drag its module into
# every pickle of it. Modules tell anew when they are copied or loaded.
_OWNERS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def set_owner(leaf: Tensor, owner: Owner) -> None:
    """Says that ``leaf`` stands for the active entries of ``owner.weight``, as long as it is ``owner.active``."""
    _OWNERS[leaf] = weakref.ref(owner)


def owner_of(param: Tensor) -> Owner | None:
    """The module whose weight ``param`` stands for a part of; None for ordinary parameters."""
    found = _OWNERS.get(param)
    owner = None if found is None else found()
    held = getattr(owner, "active", None)
    # While FSDP2 has gathered a layer, another tensor is in the place of its split leaf.
    gathered = held is not None and is_sharded(param) and not is_sharded(held)
    return owner if held is param or gathered else None


def split_owner_of(param: Tensor) -> Owner | None:
    """The module of a leaf that is split over processes, whose rows lie elsewhere than those of the weight.

    Such a leaf is stepped as a parameter of its own, and its module then writes it into the weight.
    """
    return owner_of(param) if is_sharded(param) else None


def is_compact(param: Tensor) -> bool:
    """Whether ``param`` is a leaf by whose gradient the weight is stepped."""
    return owner_of(param) is not None and not is_sharded(param)


def whole_of(param: Tensor) -> Tensor:
    """The weight that ``param`` stands for, or ``param`` itself, also where each process holds a part of it."""
    owner = owner_of(param)
    return param if owner is None else owner.weight


def weight_of(param: Tensor) -> Tensor:
    """What a step of ``param`` writes: the weight that it stands for, or this process's part of ``param``."""
    return part(param if is_sharded(param) else whole_of(param))
