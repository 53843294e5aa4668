"""Compact leaves: parameters that stand for the active rows or columns of a weight."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

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


# Kept apart from the tensors, since an attribute of a parameter does not survive copies and would drag its module into
# every pickle of it. Modules tell anew when they are copied or loaded.
_OWNERS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_ALL_OWNERS: weakref.WeakSet = weakref.WeakSet()


def set_owner(leaf: Tensor, owner: Owner) -> None:
    """Says that ``leaf`` stands for the active entries of ``owner.weight``, as long as it is ``owner.active``."""
    _OWNERS[leaf] = weakref.ref(owner)
    _ALL_OWNERS.add(owner)


def owner_of(param: Tensor) -> Owner | None:
    """The module whose weight ``param`` stands for a part of; None for ordinary parameters."""
    found = _OWNERS.get(param)
    owner = None if found is None else found()
    return owner if owner is not None and getattr(owner, "active", None) is param else None


def is_sharded_leaf(param: Any) -> bool:
    """Whether ``param`` is a DTensor that a module has in place of its leaf."""
    return is_sharded(param) and any(getattr(owner, "active", None) is param for owner in _ALL_OWNERS)


def whole_of(param: Tensor) -> Tensor:
    """The weight that ``param`` stands for, or ``param`` itself, also where each process holds a part of it."""
    owner = owner_of(param)
    return param if owner is None else owner.weight


def weight_of(param: Tensor) -> Tensor:
    """What a step of ``param`` writes: the weight that it stands for, this process's part of it, or itself."""
    return part(whole_of(param))
