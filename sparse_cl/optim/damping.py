"""The projection that damps directions of a layer's input instead of removing them."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_cl.optim.projection import WholeProjection
from sparse_cl.reference.precision import full_precision


class Damping(WholeProjection):
    """Multiplies the coordinates of an update ΔW (m, n) along orthonormal directions by gains in [0, 1].

    AdamW itself runs in these coordinates (as SOAP runs Adam in the eigenbasis of Shampoo's preconditioner, Vyas et
    al. 2024): a direction that is damped has moments of its own, and does not take its share of the steps of the
    others. The update is ΔW = diag(r) AdamW(G Q) diag(c) Qᵀ.

    Args:
        basis: Q (n, n), orthonormal columns; None: the parameter's own coordinates.
        columns: c (n,), the gain of each direction; None: 1 for each.
        rows: r (m,), the gain of each row; None: 1 for each.

    Raises:
        ValueError: gains outside [0, 1], neither of them given, or a basis of another width.
    """

    def __init__(self, basis: Tensor | None, columns: Tensor | None, rows: Tensor | None = None):
        for name, gains in (("columns", columns), ("rows", rows)):
            if gains is not None and not (gains.dim() == 1 and bool((gains >= 0).all() and (gains <= 1).all())):
                raise ValueError(f"{name}: expected a vector of gains in [0, 1], got {gains}")
        if columns is None and (rows is None or basis is not None):
            raise ValueError("columns: expected the gain of each direction of the basis, got None")
        if basis is not None and basis.shape != (len(columns), len(columns)):
            raise ValueError(
                f"basis: expected ({len(columns)}, {len(columns)}) for as many gains, got {tuple(basis.shape)}"
            )
        self.turn, self.columns, self.rows = basis, columns, rows
        given = [gains for gains in (columns, rows) if gains is not None]
        self.device = given[0].device
        size = "any" if rows is None else str(len(rows))
        self.expected = f"({size}, {'any' if columns is None else len(columns)})"
        self.any = any(bool((gains < 1).any()) for gains in given)
        self.free = all(bool((gains > 0).any()) for gains in given)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return (self.columns is None or shape[-1:] == (len(self.columns),)) and (
            self.rows is None or (len(shape) == 2 and shape[0] == len(self.rows))
        )

    def damp_(self, coordinates: Tensor) -> Tensor:
        """Multiplies coordinates (m, n), or (n,), by the gains, in place."""
        if self.columns is not None:
            coordinates.mul_(self.columns.to(coordinates.dtype))
        return coordinates if self.rows is None else coordinates.mul_(self.rows.to(coordinates.dtype)[:, None])

    def apply_(self, update: Tensor) -> None:
        self.damp_(update)
        if self.turn is not None:
            with full_precision(update.device):
                update.copy_(update @ self.turn.mT)

    def share_kept(self, matrix: Tensor) -> float:
        """Σ g C² / Σ C² of a gradient or an update (m, n), g the gain of each coordinate C; 1 for zeros."""
        wide = matrix.detach().to(self.device, torch.float64)
        energies = (wide if self.turn is None else wide @ self.turn.double()).square()
        total = float(energies.sum())
        return float(self.damp_(energies).sum()) / total if total else 1.0
