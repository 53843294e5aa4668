"""The projection of updates out of a subspace, for each kind of mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from sparse_cl.masks import ColumnMask, Mask, RowMask
from sparse_cl.reference.precision import allows_tf32
from sparse_cl.subspace import Subspace

from .leaf import weight_of
from .projection import Correction, Fitted, Layer, Memoryless, Projection

#: Conjugate-gradient steps for masks of single weights: enough for a leak below 1e-6 while a row has twice as many
#: active weights as the subspace has directions, and these are not concentrated on a few inputs.
_STEPS = 12

#: Share of a row's squared norm below which its leak is rounding error.
_DONE = 1e-13

#: Entries of an update up to which bases are copied side by side, so that one product serves several layers. A product
#: of more entries keeps a GPU busy for longer than the next takes to launch.
_SMALL = 1 << 21


class SubspaceProjection(Projection):
    """Keeps the updates ΔW (m, n) of a weight orthogonal to the used directions U (n, r) of its inputs: ΔW U = 0.

    It takes every mask: see :class:`SubspaceProjectedAdamW` for what each of them leaves.

    Args:
        subspace: U, a :class:`Subspace` or an orthonormal (n, r) tensor, float32 or float64, on the weight's device.

    Raises:
        TypeError, ValueError: a tensor that is not an orthonormal basis.
    """

    def __init__(self, subspace: Subspace | Tensor) -> None:
        self.subspace = subspace if isinstance(subspace, Subspace) else Subspace(subspace)
        self.any = self.subspace.rank > 0

    def fitted(self, param: Tensor, mask: Mask | None) -> Fitted:
        weight, width = weight_of(param), self.subspace.width
        if weight.dim() != 2 or width != weight.shape[1]:
            raise ValueError(
                f"has shape {tuple(weight.shape)}, but its basis has width {width}; expected (n, r) for a weight (m, n)"
            )
        if self.subspace.device != param.device:
            raise ValueError(
                f"is on {param.device}, but its basis is on {self.subspace.device}; move it with "
                f".to({str(param.device)!r})"
            )
        subspace = self.subspace.to(dtype=torch.float64 if param.dtype == torch.float64 else torch.float32)
        projection: RowsProjection | WeightsProjection
        if mask is None or isinstance(mask, RowMask):
            projection = RowsProjection(subspace)
        elif isinstance(mask, ColumnMask):
            projection = RowsProjection(subspace.restricted(mask.index.to(subspace.device)))
        else:
            projection = WeightsProjection(subspace, mask)
        masked = "" if mask is None else " of its mask"
        projection.spent = f"earlier domains use all directions{masked} ({subspace.rank} of {width})"
        return projection


class RowsCorrection(Correction):
    """The two products of :class:`RowsProjection`, made for several small layers of one shape at once."""

    def __init__(self, layers: Sequence[Layer]) -> None:
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


class RowsProjection(Memoryless):
    """For whole rows, all of them or a row mask's: ΔW ← ΔW - ΔW U Uᵀ, which treats each row by itself."""

    correction = RowsCorrection

    def __init__(self, subspace: Subspace) -> None:
        self.subspace = subspace
        self.free = subspace.free > 0
        self.like = (subspace.complement, subspace.matrix.shape[1])

    def apply_(self, update: Tensor) -> None:
        """Takes out of an update, in place, what lies in the subspace, in the precision in force (see ``exact``)."""
        basis, complement = self.subspace.matrix, self.subspace.complement
        _take_out_(update, basis, basis.mT, complement, _passes(update, complement))


class WeightsProjection(Memoryless):
    """For masks of single weights: the nearest update with the mask's support S that is orthogonal to U.

    Each row i is a problem of its own, min ‖δ - d‖ with δ = 0 outside S_i and δ U = 0. Its normal equations
    P S_i P z = P d, with P = U Uᵀ, are solved for all rows at once by a fixed number of conjugate-gradient steps; then
    δ = d - S_i P z. What is left of the leak depends on how well the mask's rows of U are conditioned: a row with as
    many used directions as active weights has no freedom at all. It needs five matrices of the parameter's size.
    """

    def __init__(self, subspace: Subspace, mask: Mask) -> None:
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
