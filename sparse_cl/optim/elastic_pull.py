"""The pull of a parameter towards where it was, direction by direction."""

from __future__ import annotations

import torch
from torch import Tensor

from .projection import Correction, Layer, WholeProjection


class PullCorrection(Correction):
    """Pulls each layer in AdamW's coordinates, then rotates its update back."""

    def correct_(self, lr: float | Tensor, skipped: Tensor | None) -> None:
        for layer in self.layers:
            layer.projection.pull_(layer, lr, skipped)
            layer.projection.apply_(layer.update)


class ElasticPull(WholeProjection):
    """Pulls a parameter W (m, n) back to an anchor W₀, more strongly along directions that matter more.

    AdamW runs in the coordinates D = (W - W₀) Q (as SOAP runs Adam in the eigenbasis of Shampoo's preconditioner, Vyas
    et al. 2024), and each step ends with the proximal step of ½ Σ_ij (r_i + c_j) D²_ij, decoupled from the moments as
    AdamW decouples weight decay, and stable for any strength:

        D ← D / (1 + lr (r_i + c_j))

    With c the eigenvalues of E[x xᵀ] of a layer's inputs and Q their eigenvectors this is a quadratic penalty on what
    the layer computes for these inputs; EWC (Kirkpatrick et al. 2017) penalizes single weights instead, and by the
    gradient. Consistent gradients override the pull; noise is undone.

    Args:
        anchor: W₀ (m, n), or (n,); copied.
        basis: Q (n, n), orthonormal columns; None: the parameter's own coordinates.
        columns: c (n,), at least 0; None: zeros.
        rows: r (m,), at least 0; None: zeros.

    It stores the anchor and the basis, 4 n (m + n) bytes, and makes three products of the gradient's shape per step, in
    the precision that the caller allows for float32 products (`torch.set_float32_matmul_precision`).

    Raises:
        ValueError: strengths below 0 or of another length than the anchor's, a basis of another width.
    """

    exact = False
    correction = PullCorrection

    def __init__(
        self,
        anchor: Tensor,
        basis: Tensor | None = None,
        columns: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        shape = tuple(anchor.shape)
        if rows is not None and anchor.dim() != 2:
            raise ValueError(f"rows: expected none for an anchor of shape {shape}; give columns")
        for name, strengths, size in (("columns", columns, shape[-1]), ("rows", rows, shape[0])):
            if strengths is not None and (strengths.shape != (size,) or not bool((strengths >= 0).all())):
                raise ValueError(
                    f"{name}: expected ({size},) strengths of at least 0 for an anchor of shape {shape}, got "
                    f"{tuple(strengths.shape)}, the least of them {float(strengths.min()):g}"
                )
        if basis is not None and tuple(basis.shape) != (shape[-1], shape[-1]):
            raise ValueError(f"basis: expected ({shape[-1]}, {shape[-1]}), got {tuple(basis.shape)}")
        dtype = torch.float64 if anchor.dtype == torch.float64 else torch.float32
        self.turn = None if basis is None else basis.to(dtype)
        self.shape, self.device, self.expected = shape, anchor.device, str(shape)
        given = [strengths for strengths in (columns, rows) if strengths is not None]
        self.columns = None if columns is None else columns.to(dtype)
        self.rows = None if rows is None else rows.to(dtype)[:, None]
        self.any = any(bool((strengths > 0).any()) for strengths in given)
        self.anchor = anchor.detach().to(dtype, copy=True)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return tuple(shape) == self.shape

    def pull_(self, layer: Layer, lr: float | Tensor, skipped: Tensor | None) -> None:
        """Adds the proximal step to a layer's update, in AdamW's coordinates."""
        update = layer.update
        moved = (layer.weights() if layer.start is None else layer.start) + update
        if self.turn is None:
            moved.sub_(self.anchor)
        back = moved.mul_(self.held(lr).to(moved.dtype))
        # Where a step is skipped the pull is, too.
        update.sub_(back if skipped is None else back.mul_(skipped == 0))

    def held(self, lr: float | Tensor) -> Tensor:
        """lr κ / (1 + lr κ), κ = r_i + c_j: the share of the way from the anchor that a step undoes."""
        strengths = sum(part for part in (self.columns, self.rows) if part is not None)
        return 1 - 1 / (1 + lr * strengths)

    def turned(self, weights: Tensor) -> Tensor:
        if self.turn is None:
            return weights
        with torch.autocast(weights.device.type, enabled=False):
            return (weights - self.anchor) @ self.turn

    def apply_(self, update: Tensor) -> None:
        """Rotates an update back to the parameter's coordinates, in place."""
        if self.turn is not None:
            with torch.autocast(update.device.type, enabled=False):
                update.copy_(update @ self.turn.mT)
