"""Curvature of one parameter in Kronecker factors, and the threshold that a budget of it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Halvings of the bracket, in log scale, in which a threshold is looked for: it starts below 2^11 wide.
_HALVINGS = 60

#: How far below the last product that is to be above it a threshold stays, so that float32 can tell.
_MARGIN = 1e-6


@dataclass(frozen=True)
class Kronecker:
    """F ≈ S ⊗ A for a parameter of m rows and n columns, as eigenvalues and eigenbases.

    The curvature along the update q_i k_jᵀ, of eigenvectors q_i of S and k_j of A, is λ_S[i] λ_A[j] (Martens & Grosse
    2015).

    Attributes:
        row_values: λ_S, (m,) float64, none below 0.
        row_basis: Q_S, (m, m), eigenvectors in columns; None: S is diagonal.
        column_values: λ_A, (n,), as `row_values`.
        column_basis: Q_A, (n, n), or None.
    """

    row_values: Tensor
    row_basis: Tensor | None
    column_values: Tensor
    column_basis: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, dtype: torch.dtype = torch.float32) -> Kronecker:
        """From S and A, each a symmetric matrix, or a vector that stands for its diagonal.

        Eigenvalues of a matrix come largest first, those of a diagonal in its own order. They are found in float64;
        bases are kept in `dtype`.

        Raises:
            ValueError: neither a square matrix nor a vector, or numbers that are not finite.
        """
        parts: list[Any] = []
        for name, factor in (("rows", rows), ("columns", columns)):
            if factor.dim() not in (1, 2) or factor.shape[0] != factor.shape[-1]:
                raise ValueError(f"{name}: expected (k, k), or (k,) for a diagonal, got {tuple(factor.shape)}")
            if not factor.isfinite().all():
                raise ValueError(f"{name}: expected finite numbers; look for NaN in what the factor was summed from")
            wide = factor.double()
            if factor.dim() == 1:
                parts += [wide.clamp(min=0), None]
                continue
            values, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
            parts += [values.flip(0).clamp(min=0), vectors.flip(1).to(dtype).contiguous()]
        return cls(*parts)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.row_values), len(self.column_values)

    @property
    def mass(self) -> float:
        """Σ λ_S λ_A = tr S · tr A."""
        return float(self.row_values.sum() * self.column_values.sum())

    def above(self, threshold: float) -> tuple[float, int]:
        """Σ of the products λ_S λ_A above a threshold, and how many they are, without making the m × n products."""
        columns = self.column_values.sort(descending=True).values
        sums = torch.cat([columns.new_zeros(1), columns.cumsum(0)])
        # Infinite where a row has no curvature: none of its products is above anything.
        bounds = threshold / self.row_values
        bounds = torch.where(self.row_values > 0, bounds, torch.inf)
        counts = torch.searchsorted(-columns, -bounds)
        return float(self.row_values @ sums[counts]), int(counts.sum())


def threshold_of(curvatures: Sequence[Kronecker], energy: float) -> float:
    """The largest τ, to 1e-6, such that the products λ_S λ_A above τ have at least `energy` of their sum.

    A share of the curvature's mass has no scale, so that it means the same for every model and loss. For several
    parameters together it takes the directions that matter most wherever they are.

    Args:
        energy: share in (0, 1]; 1 gives 0.

    Raises:
        ValueError: a share out of range, or no curvature.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy: expected a share in (0, 1], got {energy}")
    total = sum(curvature.mass for curvature in curvatures)
    if not total > 0:
        raise ValueError("curvatures: expected at least one with a product above 0; there is nothing to protect")
    if energy == 1:
        return 0.0
    high = max(float(c.row_values.max() * c.column_values.max()) for c in curvatures)
    # Smaller products than this have, all together, less than is left out.
    low = (1 - energy) * total / sum(c.shape[0] * c.shape[1] for c in curvatures) / 2
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        if sum(c.above(middle)[0] for c in curvatures) >= energy * total:
            low = middle
        else:
            high = middle
    return low * (1 - _MARGIN)
