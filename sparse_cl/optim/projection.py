"""The projection of an update out of a subspace, for each kind of mask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from sparse_cl.masks import ColumnMask, Mask, RowMask
from sparse_cl.reference.precision import allows_tf32
from sparse_cl.subspace import Subspace

from .state import ParameterState, compact

#: Conjugate-gradient steps for masks of single weights: enough for a leak below 1e-6 while a row has twice as many
#: active weights as the subspace has directions, and these are not concentrated on a few inputs.
_STEPS = 12

#: Share of a row's squared norm below which its leak is rounding error.
_DONE = 1e-13

#: Entries of an update up to which bases are copied side by side, so that one product serves several layers. A product
#: of more entries keeps a GPU busy for longer than the next takes to launch.
_SMALL = 1 << 21


class Projection(ABC):
    """Takes out of the updates of one parameter what would reach into what is protected.

    A step writes AdamW's whole update into a scratch; :attr:`correction` corrects it there, and only then is it added
    to the weights.

    Attributes:
        free: whether it leaves anything; if not, the parameter is not updated.
        turn: orthogonal (n, n), or None. Where there is one, AdamW is given the gradient G Q, so that its moments are
            those of the directions in the columns of Q, and the update to correct is in these coordinates, without
            weight decay, which the optimizer adds once `apply_` has turned it back.
        exact: whether it needs float32 products where the caller allows less, but for TF32 on a GPU, which it then must
            bear; else its products are made as the caller allows.
        correction: what corrects the updates of all layers whose projections name it.
        like: projections of one ``like`` are best corrected side by side where the updates have one shape.
    """

    free: bool
    turn: Tensor | None = None
    exact: bool = True
    correction: type[Correction]
    like: Hashable = None

    def turned(self, weights: Tensor) -> Tensor:
        """(W - W₀) Q, W₀ the projection's own: only differences are turned, which bears products in low precision.

        Here, without a turn, the weights as they are.
        """
        return weights

    def new_state(self, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
        """Zeros for what it remembers of updates of this shape: part of the parameter's state and of checkpoints."""
        return {}

    @abstractmethod
    def apply_(self, update: Tensor) -> None:
        """Replaces an update, in the mask's compact shape, by what is left of it in the parameter's coordinates."""


@dataclass
class Layer:
    """One parameter of a projected step.

    Attributes:
        projection: its projection.
        update: AdamW's update of it, compact, to be corrected in place.
        param, packed: the weight that is stepped and its state; not to be written.
        kept: the tensors of :meth:`Projection.new_state`.
        start: the weights before the update, `turned`, where the projection has a turn.
    """

    projection: Projection
    update: Tensor
    param: Tensor
    packed: ParameterState
    kept: dict[str, Tensor]
    start: Tensor | None = None

    def weights(self) -> Tensor:
        """The active weights as they are stepped, float32 or float64; may share their memory."""
        if self.packed.layout.master:
            return self.packed.views["master"]
        return compact(self.param, self.packed.layout, self.packed.views).to(self.packed.layout.dtype)


class Correction:
    """Corrects the updates of layers, step after step; this one layer by layer."""

    def __init__(self, layers: Sequence[Layer]):
        self.layers = layers

    @staticmethod
    def begin(corrections: Sequence[Correction], lr: float | Tensor, skipped: Tensor | None) -> None:
        """Called once a step with all corrections of this class, for what is cheaper made for all layers at once.

        Args:
            corrections: of one device, parameter group and dtype of updates.
            lr, skipped: as of :meth:`correct_`.
        """

    def correct_(self, lr: float | Tensor, skipped: Tensor | None) -> None:
        """Corrects all updates in place.

        Args:
            lr: the learning rate in force; a tensor (0-d) is on the layers' device.
            skipped: a scalar, not 0 where AdamW skipped the step for a gradient that was not finite; None: it did not.
        """
        for layer in self.layers:
            layer.projection.apply_(layer.update)

    def settle_(self) -> None:
        """Called once the weights have been written."""


class PullCorrection(Correction):
    """For projections that pull the parameter itself, besides."""

    def correct_(self, lr: float | Tensor, skipped: Tensor | None) -> None:
        for layer in self.layers:
            layer.projection.pull_(layer, lr, skipped)
            layer.projection.apply_(layer.update)


class RowsCorrection(Correction):
    """The two products of :class:`RowsProjection`, made for several small layers of one shape at once."""

    def __init__(self, layers: Sequence[Layer]):
        super().__init__(layers)
        self.products: list[tuple[Tensor, Tensor, Tensor, bool]] = []
        for _, found in groupby(layers, key=lambda layer: (layer.update.shape, layer.projection.like)):
            for run in _runs(list(found)):
                bases = [layer.projection.subspace.matrix for layer in run]
                basis = bases[0] if len(run) == 1 else torch.stack(bases)
                self.products.append((_stacked(run), basis, basis.mT, run[0].projection.subspace.complement))

    def correct_(self, lr: float | Tensor, skipped: Tensor | None) -> None:
        passes = [_passes(self.layers[0].update, complement) for complement in (False, True)]
        for updates, basis, transposed, complement in self.products:
            _take_out_(updates, basis, transposed, complement, passes[complement])


def _runs(layers: list[Layer]) -> Iterator[list[Layer]]:
    """Splits layers of one shape into those whose updates lie at equal distances, if a batch of them pays."""
    update, basis = layers[0].update, layers[0].projection.subspace.matrix
    # A basis that is larger than the update would make the copy of all of them the largest thing there is.
    if update.numel() > _SMALL or basis.numel() > update.numel():
        yield from ([layer] for layer in layers)
        return
    run = layers[:1]
    for layer in layers[1:]:
        apart = layer.update.storage_offset() - run[-1].update.storage_offset()
        if len(run) == 1 or apart == run[1].update.storage_offset() - run[0].update.storage_offset():
            run.append(layer)
        else:
            yield run
            run = [layer]
    yield run


def _stacked(run: list[Layer]) -> Tensor:
    """Updates that lie in one buffer at equal distances as one tensor (layers, m, n), or (m, n) of one layer."""
    if len(run) == 1:
        return run[0].update
    first, second = (layer.update for layer in run[:2])
    distance = second.storage_offset() - first.storage_offset()
    return first.as_strided((len(run), *first.shape), (distance, *first.stride()))


def _passes(update: Tensor, complement: bool) -> int:
    """How often to take out.

    In TF32 a first pass leaves 1e-7 to 4e-6 of an update inside, for 1/4 to 9/10 of all directions used: the error of
    what it takes. A second pass leaves 4e-8 at most, the error of the basis' own rounding, which is all that keeping
    the complement leaves in one.
    """
    return 2 if not complement and allows_tf32(update.device) and update.dtype == torch.float32 else 1


def _take_out_(updates: Tensor, basis: Tensor, transposed: Tensor, complement: bool, passes: int) -> None:
    """ΔW ← ΔW - (ΔW U) Uᵀ, or of a complement ΔW ← (ΔW F) Fᵀ."""
    for _ in range(passes):
        coefficients = updates @ basis
        if complement:
            torch.matmul(coefficients, transposed, out=updates)
        elif updates.dim() == 2:
            updates.addmm_(coefficients, transposed, alpha=-1)
        else:
            updates.baddbmm_(coefficients, transposed, alpha=-1)


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
    correction = Correction

    @abstractmethod
    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it is for a parameter of this shape."""


class RowsProjection(Projection):
    """For whole rows, all of them or a row mask's: ΔW ← ΔW - ΔW U Uᵀ, which treats each row by itself."""

    correction = RowsCorrection

    def __init__(self, subspace: Subspace):
        self.subspace = subspace
        self.free = subspace.free > 0
        self.like = (subspace.complement, subspace.matrix.shape[1])

    def apply_(self, update: Tensor) -> None:
        """As there, in the precision in force, see :attr:`exact`."""
        basis, complement = self.subspace.matrix, self.subspace.complement
        _take_out_(update, basis, basis.mT, complement, _passes(update, complement))


class WeightsProjection(Projection):
    """For masks of single weights: the nearest update with the mask's support S that is orthogonal to U.

    Each row i is a problem of its own, min ‖δ - d‖ with δ = 0 outside S_i and δ U = 0. Its normal equations
    P S_i P z = P d, with P = U Uᵀ, are solved for all rows at once by a fixed number of conjugate-gradient steps; then
    δ = d - S_i P z. What is left of the leak depends on how well the mask's rows of U are conditioned: a row with as
    many used directions as active weights has no freedom at all. It needs five matrices of the parameter's size.
    """

    correction = Correction

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
