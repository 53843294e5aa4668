"""The projection out of the directions in which the loss of earlier domains is curved."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_cl.layout import is_sharded
from sparse_cl.masks import Mask
from sparse_cl.reference.precision import full_precision
from sparse_cl.subspace.kronecker import Kronecker

from .leaf import owner_of
from .projection import Correction, Fitted, Projection

MODES = ("hard", "soft")

#: λ_S λ_A / τ above which damping is 1 to float32's precision; keeps products of float32 factors finite.
_HUGE = 1e18


class CurvatureProjection(Projection, Fitted):
    """Removes or damps the coordinates C = Q_Sᵀ ΔW Q_A of an update (m, n) for which λ_S λ_A is large.

    "hard": those above τ are removed, so that what is left obeys tr(S ΔW A ΔWᵀ) = Σ λ_S λ_A C² <= τ ‖ΔW‖²_F.
    "soft": each is multiplied by τ/(τ + λ_S λ_A), the gain of a step against a quadratic penalty of that curvature.

    Args:
        curvature: of the parameter; for one that is not a matrix, (numel, 1) with diagonal rows.
        threshold: τ >= 0, in the units of λ_S λ_A.
        mode: "hard" or "soft".

    It stores the eigenbases (4 (m² + n²) bytes); a step needs two matrices of the update's size besides. "hard" needs
    products with the leading eigenvectors only.

    Raises:
        ValueError: a threshold below 0, or another mode.
    """

    correction = Correction

    def __init__(self, curvature: Kronecker, threshold: float, mode: str = "hard") -> None:
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        if not threshold >= 0:
            raise ValueError(f"threshold: expected at least 0, got {threshold}")
        self.curvature, self.threshold, self.mode = curvature, threshold, mode
        rows, columns = curvature.row_values, curvature.column_values
        self.device = rows.device
        least = float(rows.min() * columns.min())
        self.free = least <= threshold if mode == "hard" else threshold > 0 or least == 0
        self.any = curvature.above(threshold if mode == "hard" else 0.0)[1] > 0
        # Coordinates that nothing is taken from need not be made.
        most_rows, most_columns = rows.max(), columns.max()
        bound = threshold if mode == "hard" else 0.0
        kept = [len(rows), len(columns)]
        if curvature.row_basis is not None:
            kept[0] = int((rows * most_columns > bound).sum())
        if curvature.column_basis is not None:
            kept[1] = int((columns * most_rows > bound).sum())
        self._row_basis = None if curvature.row_basis is None else curvature.row_basis[:, : kept[0]]
        self._column_basis = None if curvature.column_basis is None else curvature.column_basis[:, : kept[1]]
        # λ_S λ_A / τ in two factors of which one is at most 1, so that neither overflows in float32.
        scale = most_columns / max(threshold, torch.finfo(torch.float64).tiny)
        dtype = self._dtype()
        # Where τ is 0 the scale is infinite, and so is each row's factor that is above 0.
        self._rows = (rows[: kept[0]] * scale).nan_to_num(nan=0.0).clamp(max=_HUGE).to(dtype)
        self._columns = (columns[: kept[1]] / most_columns.clamp(min=torch.finfo(torch.float64).tiny)).to(dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return self.curvature.shape

    def fitted(self, param: Tensor, mask: Mask | None) -> Fitted:
        if is_sharded(param):
            raise ValueError(
                "is split over processes, but a CurvatureProjection mixes rows that lie in several of them; train in "
                "one process or by DistributedDataParallel, or use a LowRankPull"
            )
        # A leaf has its mask in the module, and is whole here.
        if mask is not None and owner_of(param) is None:
            raise ValueError(
                f"has a {type(mask).__name__}, but what a mask leaves of an update lies in other directions than a "
                "CurvatureProjection knows; leave one of the two out, or use a LowRankPull, which takes masks"
            )
        shape = tuple(param.shape)
        if shape != self.shape and (len(shape) == 2 or math.prod(shape) != math.prod(self.shape)):
            raise ValueError(
                f"has shape {shape}, but its projection is for {self.shape}, or (numel, 1) for a parameter that is not "
                "a matrix"
            )
        if self.device != param.device:
            raise ValueError(f"is on {param.device}, but its projection is on {self.device}; make it there")
        return self

    def _dtype(self) -> torch.dtype:
        bases = [b for b in (self.curvature.row_basis, self.curvature.column_basis) if b is not None]
        return bases[0].dtype if bases else torch.float32

    def protection(self) -> Tensor:
        """What is taken from each of the leading coordinates, in [0, 1]; nothing is taken from the others."""
        ratio = self._rows[:, None] * self._columns
        return (ratio > 1).to(ratio.dtype) if self.mode == "hard" else ratio.div_(ratio + 1)

    def used(self) -> float:
        """Σ of the protection: with "hard" the number of removed coordinates, with "soft" what that amounts to."""
        return float(self.protection().sum(dtype=torch.float64))

    def share_inside(self, update: Tensor) -> float:
        """Σ p C² / Σ C² of an update, p its `protection`: the share of its energy in protected directions."""
        update = update.detach().reshape(self.shape).to(self.device, torch.float64)
        total = float(update.square().sum())
        if not total:
            return 0.0
        return float((self._leading(update).square() * self.protection()).sum()) / total

    def apply_(self, update: Tensor) -> None:
        """Takes out of an update, in place, what its protection says."""
        matrix = update if update.shape == self.shape else update.view(self.shape)
        with full_precision(update.device):
            taken = self._leading(matrix).mul_(self.protection())
            if self._row_basis is not None:
                taken = self._row_basis.to(taken.dtype) @ taken
            if self._column_basis is not None:
                matrix.addmm_(taken, self._column_basis.mT.to(taken.dtype), alpha=-1)
            else:
                matrix.sub_(taken)

    def _leading(self, matrix: Tensor) -> Tensor:
        coordinates = matrix
        if self._row_basis is not None:
            coordinates = self._row_basis.mT.to(matrix.dtype) @ coordinates
        if self._column_basis is not None:
            coordinates = coordinates @ self._column_basis.to(matrix.dtype)
        return coordinates.clone() if coordinates is matrix else coordinates
