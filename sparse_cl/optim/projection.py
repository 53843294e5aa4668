"""The projection of an update out of a subspace, for each kind of mask."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sparse_cl.masks import ColumnMask, Mask, RowMask
from sparse_cl.subspace import Subspace

#: Conjugate-gradient steps for masks of single weights: enough for a leak below 1e-6 while a row has twice as many
#: active weights as the subspace has directions, and these are not concentrated on a few inputs.
_STEPS = 12

#: Share of a row's squared norm below which its leak is rounding error.
_DONE = 1e-13


class Projection(ABC):
    """Takes out of the updates of one parameter what would reach into what is protected.

    Attributes:
        free: whether it leaves anything; if not, the parameter is not updated.
        turn: orthogonal (n, n), or None. Where there is one, AdamW steps `turned` of the weights, which weight decay
            has left, with the gradient G Q, so that its moments are those of the directions in the columns of Q, and
            `apply_` is given an update in these coordinates.
    """

    free: bool
    turn: Tensor | None = None

    def turned(self, weights: Tensor) -> Tensor:
        """(W - W₀) Q, W₀ the projection's own: only differences are turned, which bears products in low precision.

        Here, without a turn, the weights as they are.
        """
        return weights

    @abstractmethod
    def apply_(self, update: Tensor) -> None:
        """Replaces an update, in the mask's compact shape, by what is left of it in the parameter's coordinates."""


class WholeProjection(Projection):
    """Of whole parameters, without a mask; it may pull the parameter itself besides.

    Attributes:
        any: whether it takes anything; if not, the step is plain AdamW's.
        expected: the shapes that it fits, in words.
        device: where it is.
    """

    any: bool
    expected: str
    device: torch.device

    def pull_(self, update: Tensor, start: Tensor, lr: float | Tensor, skipped: Tensor | None) -> None:
        """Adds to an update, in AdamW's coordinates, what pulls the parameter itself somewhere.

        Args:
            start: the parameter before the update, `turned` where there is a turn.
            skipped: a scalar, not 0 where AdamW skipped the step for a gradient that was not finite; None: it did not.
        """

    @abstractmethod
    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it is for a parameter of this shape."""


class RowsProjection(Projection):
    """For whole rows, all of them or a row mask's: ΔW ← ΔW - ΔW U Uᵀ, which treats each row by itself."""

    def __init__(self, subspace: Subspace):
        self.subspace = subspace
        self.free = subspace.free > 0

    def apply_(self, update: Tensor) -> None:
        self.subspace.project_out_(update)


class WeightsProjection(Projection):
    """For masks of single weights: the nearest update with the mask's support S that is orthogonal to U.

    Each row i is a problem of its own, min ‖δ - d‖ with δ = 0 outside S_i and δ U = 0. Its normal equations
    P S_i P z = P d, with P = U Uᵀ, are solved for all rows at once by a fixed number of conjugate-gradient steps; then
    δ = d - S_i P z. What is left of the leak depends on how well the mask's rows of U are conditioned: a row with as
    many used directions as active weights has no freedom at all. It needs five matrices of the parameter's size.
    """

    def __init__(self, subspace: Subspace, mask: Mask):
        self.subspace, self.mask = subspace, mask
        self.free = subspace.free > 0

    def apply_(self, update: Tensor) -> None:
        support = self.mask.to(update.device).to_dense()
        dense = torch.zeros(self.mask.shape, dtype=update.dtype, device=update.device)
        dense[support] = update.view(-1)

        def used(x: Tensor) -> Tensor:
            return x - self.subspace.project_out_(x.clone())

        residual = used(dense)
        direction = residual.clone()
        square = residual.square().sum(1, keepdim=True)
        # Past this a row has nothing but rounding errors left, and steps along those would undo it.
        enough = _DONE * dense.square().sum(1, keepdim=True)
        for _ in range(_STEPS):
            masked = direction * support
            image = used(masked)
            curvature = (direction * image).sum(1, keepdim=True)
            step = torch.where(square > enough, square / curvature, 0)
            dense.addcmul_(masked, step, value=-1)
            residual.addcmul_(image, step, value=-1)
            before, square = square, residual.square().sum(1, keepdim=True)
            direction.mul_(torch.where(before > enough, square / before, 0)).add_(residual)
        update.copy_(dense[support].view(update.shape))


def make_projection(subspace: Subspace, mask: Mask | None) -> Projection:
    """The projection of updates of a parameter with this mask."""
    if mask is None or isinstance(mask, RowMask):
        return RowsProjection(subspace)
    if isinstance(mask, ColumnMask):
        return RowsProjection(subspace.restricted(mask.index.to(subspace.device)))
    return WeightsProjection(subspace, mask)
