"""What becomes of an update between AdamW and the weights: the protocol of projections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_cl.masks import Mask


class Projection(ABC):
    """What the caller gives :class:`ProjectedAdamW` for a parameter: an immutable value.

    Attributes:
        any: whether it takes anything from updates; if not, the parameter is stepped by plain AdamW.
    """

    any: bool = True

    @abstractmethod
    def fitted(self, param: Tensor, mask: Mask | None) -> Fitted:
        """This projection for the updates of ``param``, whose active entries are those of ``mask`` (None: all).

        Raises:
            ValueError: it does not fit; the text goes on from the name of the parameter.
        """


class Fitted:
    """A projection in force: how a step treats the updates of one parameter.

    A step writes AdamW's whole update, weight decay included, into a scratch; :attr:`correction` corrects it there, and
    only then is it added to the weights.

    Attributes:
        free: whether it leaves anything; if not, the parameter is not updated.
        spent: what a warning then says of the parameter.
        exact: whether it needs float32 products where the caller allows less, such as TF32.
        bounds: whether it promises how far a weight moves, and so must know of every move.
        later: whether weights are corrected after several plain steps, in place of each update.
        said: what it is, in words that are the same in processes that hold parts of one weight.
        correction: corrects the updates of all layers whose projections name it and are ``alike``.
    """

    free: bool = True
    spent: str = "all its directions are protected"
    exact: bool = True
    bounds: bool = False
    later: bool = False
    said: str = ""
    correction: type[Correction]
    alike: Hashable = None

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Of what it remembers of a weight of this shape: part of the parameter's state and of checkpoints."""
        return {}

    def continues(self, other: Fitted) -> bool:
        """Whether what ``other`` remembers, the same projection under another mask, is right for this one."""
        return True

    def begin(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """What it remembers before the first step.

        Args:
            weight: as it is now, whole.
            dtype: of the updates.
        """
        return {}


@dataclass
class Layer:
    """One parameter of a projected step.

    Attributes:
        projection: a :class:`Fitted` of the kind that the layer's correction is for.
        update: AdamW's update, compact, to be corrected in place.
        kept: the tensors of :meth:`Fitted.begin`.
        weights: the active entries as they are now, in the shape and dtype of the update, and the whole weight.
    """

    projection: Any
    update: Tensor
    kept: dict[str, Tensor]
    weights: Callable[[], tuple[Tensor, Tensor]]


class Correction:
    """Corrects the updates of layers, step after step; here each by `apply_(update)` of its own projection."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers

    def correct_(self, lr: float | Tensor, skipped: Tensor | None) -> None:
        """Corrects all updates in place.

        Args:
            lr: the learning rate in force; a tensor (0-d) is on the layers' device.
            skipped: a scalar, not 0 if AdamW skipped the step because a gradient was not finite; None: it did not.
        """
        for layer in self.layers:
            layer.projection.apply_(layer.update)

    def settle_(self) -> None:
        """Called once the weights have been written, so that what is kept describes the weights as they are.

        Python can be interrupted between the two. What is kept then lacks that one step.
        """
