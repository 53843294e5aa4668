"""The pull of a layer's weight towards where it was, along the leading directions of its old inputs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from sparse_cl.subspace.subspace import check_orthonormal

from .projection import Correction, Layer, WholeProjection


class LowRankCorrection(Correction):
    """P ← P + ΔW U, C = P f, ΔW ← ΔW - C Uᵀ, P ← P - C with f_j = lr κ_j / (1 + lr κ_j): four launches a layer."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        self.moved = [layer.kept["moved"] for layer in layers]
        self.bases = [layer.projection.basis.to(layer.update.dtype) for layer in layers]
        self.factors: _Factors | None = None
        self.taken: list[Tensor] = []
        self.left: list[Tensor] = []
        self.next: list[Tensor] = []

    @staticmethod
    def begin(corrections: Sequence[LowRankCorrection], lr: float | Tensor, skipped: Tensor | None) -> None:
        factors = corrections[0].factors
        if factors is None or factors.corrections != corrections:
            factors = _Factors(corrections)
        factors.set(lr, skipped)

    def correct_(self, lr: float | Tensor, skipped: Tensor | None) -> None:
        self.next = []
        columns = torch._foreach_mul(self.bases, self.taken)
        for layer, moved, basis, taken in zip(self.layers, self.moved, self.bases, columns, strict=True):
            # Not in place: should the step fail before the weights are written, P is still theirs.
            after = torch.addmm(moved, layer.update, basis)
            layer.update.addmm_(after, taken.mT, alpha=-1)
            self.next.append(after)

    def settle_(self) -> None:
        for moved, after, left in zip(self.moved, self.next, self.left, strict=True):
            torch.mul(after, left, out=moved)
        self.next = []


class _Factors:
    """f and 1 - f of all layers of a step, in one buffer each: a few launches a step."""

    def __init__(self, corrections: Sequence[LowRankCorrection]) -> None:
        self.corrections = corrections
        layers = [layer for correction in corrections for layer in correction.layers]
        strengths = [layer.projection.strengths for layer in layers]
        # float64: in float32 a strength of 1e38 and a rate above 1 would make inf / inf.
        self.strengths = torch.cat([part.double() for part in strengths])
        self.taken = torch.empty_like(self.strengths, dtype=layers[0].update.dtype)
        self.left = torch.empty_like(self.taken)
        ranks = [len(part) for part in strengths]
        taken, left = iter(self.taken.split(ranks)), iter(self.left.split(ranks))
        for correction in corrections:
            correction.factors = self
            correction.taken = list(islice(taken, len(correction.layers)))
            correction.left = list(islice(left, len(correction.layers)))

    def set(self, lr: float | Tensor, skipped: Tensor | None) -> None:
        scaled = self.strengths * lr
        if skipped is not None:
            scaled = torch.where(skipped == 0, scaled, 0.0)
        whole = 1 + scaled
        self.taken.copy_(scaled / whole)
        self.left.copy_(whole.reciprocal_())


class LowRankPull(WholeProjection):
    """Pulls a weight W (m, n) back to W₀, where it was, along r directions u_j, each with a strength κ_j.

    After AdamW's update ΔW, weight decay included, comes the proximal step of ½ Σ_j κ_j ‖(W - W₀) u_j‖², decoupled
    from the moments as weight decay is, and stable for any strength:

        (W - W₀) u_j ← (W - W₀) u_j / (1 + lr κ_j)

    With U the leading eigenvectors of E[x xᵀ] of a layer's inputs and κ in proportion to their eigenvalues, it is a
    quadratic penalty on what the layer computes for these inputs. Consistent gradients override the pull; noise is
    undone. All else that a step does is AdamW's.

    Args:
        basis: U (n, r), float32 or float64, orthonormal columns.
        strengths: κ (r,), finite, at least 0; a coordinate settles at about 1/κ_j, whatever the rate.

    The optimizer keeps P = (W - W₀) U, (m, r) in the dtype of the moments, in the parameter's state and its
    checkpoints (``"projection.moved"``). P is zero at the first step, so W₀ is the weight at that moment; no copy of W₀
    is kept. For a compact leaf of rows, P has these rows only. A pull of the same rank continues from the P of a
    checkpoint: load the checkpoint before a new domain's pull is set, not after. An interrupt that Python delivers
    between the write of the weights and that of P leaves that one step out of P.

    Products have the precision that the caller allows for float32 products. For half-precision parameters without
    masters, P follows the weights before they are rounded: without bias, but not exactly.

    Raises:
        TypeError, ValueError: a basis that is not orthonormal; strengths below 0, not finite, or of another number.
    """

    exact = False
    correction = LowRankCorrection

    def __init__(self, basis: Tensor, strengths: Tensor) -> None:
        check_orthonormal(basis)
        if strengths.shape != basis.shape[1:] or not bool((strengths >= 0).all() and strengths.isfinite().all()):
            got = f", from {float(strengths.min()):g} to {float(strengths.max()):g}" if strengths.numel() else ""
            raise ValueError(
                f"strengths: expected {tuple(basis.shape[1:])} finite numbers of at least 0, one for each column of "
                f"the basis {tuple(basis.shape)}, got {tuple(strengths.shape)}{got}"
            )
        if strengths.device != basis.device:
            raise ValueError(f"strengths: expected the device of the basis, {basis.device}, got {strengths.device}")
        self.basis, self.strengths = basis.detach(), strengths.detach().to(basis.dtype)
        self.device, self.expected = basis.device, f"(m, {basis.shape[0]})"
        self.any = bool((strengths > 0).any())

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and shape[1] == self.basis.shape[0]

    def new_state(self, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
        return {"moved": torch.zeros(shape[0], self.basis.shape[1], dtype=dtype, device=self.device)}
