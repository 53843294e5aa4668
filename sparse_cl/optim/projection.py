"""What becomes of an update between AdamW and the weights: the protocol of projections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_cl.masks import Mask

from .leaf import owner_of
from .state import ParameterState


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

    A step writes AdamW's whole update into a scratch; :attr:`correction` corrects it there, and only then is it added
    to the weights.

    Attributes:
        free: whether it leaves anything; if not, the parameter is not updated.
        spent: what a warning then says of the parameter.
        turn: orthogonal (n, n), or None. If there is one, AdamW gets the gradient G Q, so that its moments are those of
            the directions in the columns of Q. The update to correct is in these coordinates and lacks the weight
            decay, which the optimizer adds after the correction has rotated it back.
        exact: whether it needs float32 products where the caller allows less. On a GPU it must still tolerate TF32.
            Otherwise its products are made as the caller allows.
        correction: corrects the updates of all layers whose projections name it.
        like: projections with an equal ``like`` are best corrected side by side if their updates have one shape.
    """

    free: bool = True
    spent: str = "all its directions are protected"
    turn: Tensor | None = None
    exact: bool = True
    correction: type[Correction]
    like: Hashable = None

    def turned(self, weights: Tensor) -> Tensor:
        """(W - W₀) Q, with the projection's own W₀. Only differences are rotated, so low-precision products suffice.

        Without a turn: the weights as they are.
        """
        return weights

    def new_state(self, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
        """Zeros for what it remembers of updates of this shape: part of the parameter's state and of checkpoints."""
        return {}


@dataclass
class Layer:
    """One parameter of a projected step.

    Attributes:
        projection: a :class:`Fitted` of the kind that the layer's correction is for.
        update: AdamW's update, compact, to be corrected in place.
        param, packed: the weight that is stepped and its state; read only.
        kept: the tensors of :meth:`Fitted.new_state`.
        start: the weights before the update, `turned`, if the projection has a turn.
    """

    projection: Any
    update: Tensor
    param: Tensor
    packed: ParameterState
    kept: dict[str, Tensor]
    start: Tensor | None = None

    def weights(self) -> Tensor:
        """The active weights as they are stepped, float32 or float64; may share their memory."""
        if self.packed.layout.master:
            return self.packed.views["master"]
        return self.packed.active(self.param).to(self.packed.layout.dtype)


class Correction:
    """Corrects the updates of layers, step after step; here each by its own :class:`Memoryless` projection."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers

    @staticmethod
    def begin(corrections: Sequence[Any], lr: float | Tensor, skipped: Tensor | None) -> None:
        """Called once per step with all corrections of this class, for what is cheaper made for all layers at once.

        Args:
            corrections: of one device, parameter group and dtype of updates.
            lr, skipped: as for :meth:`correct_`.
        """

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


class Memoryless(ABC, Fitted):
    """A projection that corrects each update by itself."""

    correction = Correction

    @abstractmethod
    def apply_(self, update: Tensor) -> None:
        """Replaces an update, in the mask's compact shape, by what is left of it in the parameter's coordinates."""


class WholeProjection(Projection, Fitted):
    """A projection of whole parameters, or of compact leaves, which have their mask in the module.

    Attributes:
        expected: the shapes that it fits, in words.
        device: where it is.
    """

    expected: str
    device: torch.device

    @abstractmethod
    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it is for a parameter of this shape."""

    def fitted(self, param: Tensor, mask: Mask | None) -> Fitted:
        if mask is not None and owner_of(param) is None:
            raise ValueError(
                f"has a {type(mask).__name__}, but what a mask leaves of an update lies in other directions than a "
                f"{type(self).__name__} knows; leave one of the two out, or use a SubspaceProjection, which takes masks"
            )
        if not self.fits(tuple(param.shape)):
            raise ValueError(f"has shape {tuple(param.shape)}, but its projection is for {self.expected}")
        if self.device != param.device:
            raise ValueError(f"is on {param.device}, but its projection is on {self.device}; make it there")
        return self
