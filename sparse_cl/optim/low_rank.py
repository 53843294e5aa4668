"""Keeping a weight where it was along the directions that earlier domains use: AdamW's update, then a correction."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from sparse_cl.masks import ColumnMask, Mask, RowMask
from sparse_cl.subspace import Subspace, UsedRows

from .held_rows import HeldRows
from .leaf import weight_of
from .projection import Correction, Fitted, Layer, Projection
from .rules import Budget, Hard, Pull, Rule


class LowRankProjection(Projection):
    """Corrects the updates ΔW of a weight W (m, n) in r directions U (n, r) of its inputs; all else is AdamW's.

        P ← P + ΔW U,  C = P - (what the rule leaves of P),  ΔW ← ΔW - C Uᵀ,  P ← P - C

    with P = (W - W₀) U, W₀ the weight at the first step: no copy of it is kept. Of a :class:`RowMask` the mask's rows
    are corrected; P knows all, so that a budget still holds when the mask changes. Of a :class:`ColumnMask` the
    directions are what its columns see of U, exactly. With masks of single weights C Uᵀ is cut to the mask: P stays
    exact, and a step never moves W further away, but it takes back less.

    The optimizer keeps P, (m, r) in the dtype of the moments, in the parameter's state and in checkpoints
    (``"projection.moved"``), and one number (``"projection.held"``). Load a checkpoint before a new domain's projection
    is set, not after. An interrupt that Python delivers between the write of the weights and that of P leaves that one
    step out of P.

    Args:
        rule: what of P a step leaves.
        subspace: U and λ, or a tensor U.
        strengths: (r,), what the rule means by them; None: λ.
        transposed: the weight is (n, m), as that of transformers' Conv1D.
        from_zero: W₀ is zero, as for the A of an adapter, whose change is all of it.

    Raises:
        TypeError, ValueError: a basis that is not orthonormal; strengths below 0, not finite, or of another number.
    """

    def __init__(
        self,
        rule: Rule,
        subspace: Subspace | Tensor,
        strengths: Tensor | None = None,
        *,
        transposed: bool = False,
        from_zero: bool = False,
    ) -> None:
        found = subspace if isinstance(subspace, Subspace) else Subspace(subspace)
        if strengths is not None:
            try:
                found = Subspace(found.basis, strengths.to(found.basis.dtype))
            except ValueError as error:
                raise ValueError(str(error).replace("values:", "strengths:")) from None
        self.rule, self.subspace, self.transposed, self.from_zero = rule, found, transposed, from_zero
        self.rows: HeldRows | None = None
        self.any = found.rank > 0 and (isinstance(rule, Hard) or bool((found.values > 0).any()))

    def with_rows(self, rows: UsedRows, strengths: Tensor | None = None) -> LowRankProjection:
        """This projection with the rule on rows of the weight too, which is an embedding's, (V, n).

        Args:
            rows: those that earlier domains look up.
            strengths: (k,), what the rule means by them; None: the rows' values.
        """
        found = copy(self)
        found.rows = HeldRows(rows, strengths)
        found.any = self.any or isinstance(self.rule, Hard) or bool((found.rows.strengths > 0).any())
        return found

    def fitted(self, param: Tensor, mask: Mask | None) -> Fitted:
        weight, subspace = weight_of(param), self.subspace
        if weight.dim() != 2 or subspace.width != weight.shape[0 if self.transposed else 1]:
            expected = "(n, r) for a weight (n, m)" if self.transposed else "(n, r) for a weight (m, n)"
            raise ValueError(
                f"has shape {tuple(weight.shape)}, but its basis has width {subspace.width}; expected {expected}"
            )
        if subspace.device != param.device:
            raise ValueError(
                f"is on {param.device}, but its basis is on {subspace.device}; move it with .to({str(param.device)!r})"
            )
        if mask is not None and self.rows is not None:
            raise ValueError(
                f"has a {type(mask).__name__}, which the protection of an embedding's rows does not take; leave the "
                "mask out, or free the rows by row_strength=0"
            )
        single = mask is not None and not isinstance(mask, RowMask | ColumnMask)
        if mask is not None and (self.transposed or self.from_zero):
            kind = "a transposed weight" if self.transposed else "an adapter"
            raise ValueError(f"has a {type(mask).__name__}, which the projection of {kind} does not take; leave it out")
        if single and isinstance(self.rule, Budget):
            raise ValueError(
                f"has a {type(mask).__name__}, within which no budget can be kept; take a RowMask or ColumnMask, or a "
                "strength instead of a budget"
            )
        subspace = subspace.to(dtype=torch.float64 if param.dtype == torch.float64 else torch.float32)
        seen = subspace
        if isinstance(mask, ColumnMask):
            # What may not move at all counts alike, however little it is used.
            wanted = Subspace(subspace.basis) if isinstance(self.rule, Hard) else subspace
            seen = wanted.restricted(mask.index.to(subspace.device))
        return FittedLowRank(self, subspace, seen, mask)


class SubspaceProjection(LowRankProjection):
    """Keeps the updates ΔW (m, n) of a weight orthogonal to the used directions U (n, r) of its inputs: ΔW U = 0.

    Args:
        subspace: U, a :class:`Subspace` or an orthonormal (n, r) tensor, float32 or float64, on the weight's device.
        transposed: the weight is (n, m).

    Raises:
        TypeError, ValueError: a tensor that is not an orthonormal basis.
    """

    def __init__(self, subspace: Subspace | Tensor, *, transposed: bool = False) -> None:
        super().__init__(Hard(), subspace, transposed=transposed)


class LowRankPull(LowRankProjection):
    """Pulls a weight W (m, n) back to where it was, along r directions u_j, each with a strength κ_j.

    After AdamW's update comes the proximal step of ½ Σ_j κ_j ‖(W - W₀) u_j‖², decoupled from the moments as weight
    decay is, and stable for any strength. With κ in proportion to the energies of old inputs this is a quadratic
    penalty on what the layer computes for them: EWC (Kirkpatrick et al. 2017) with the input half of a Kronecker
    factored Fisher (Ritter, Botev & Barber 2018), in low rank.

    Args:
        subspace: a :class:`Subspace` or an orthonormal (n, r) tensor, float32 or float64.
        strengths: κ (r,), finite, at least 0; None: the subspace's usage.
        transposed, from_zero: as for :class:`LowRankProjection`.
    """

    def __init__(
        self,
        subspace: Subspace | Tensor,
        strengths: Tensor | None = None,
        *,
        transposed: bool = False,
        from_zero: bool = False,
    ) -> None:
        if strengths is None and isinstance(subspace, Subspace):
            strengths = subspace.usage
        super().__init__(Pull(), subspace, strengths, transposed=transposed, from_zero=from_zero)


class DriftBudget(LowRankProjection):
    """Lets what a layer computes for old inputs move by at most a share of its energy, at every step.

    Σ_j λ_j ‖(W - W₀) u_j‖² ≤ budget · Σ_j λ_j ‖W₀ u_j‖², with λ the energies of old inputs along U.

    Args:
        subspace: U and λ.
        budget: above 0; with 0 a :class:`SubspaceProjection` does the same for less.
        transposed: the weight is (n, m).

    Raises:
        ValueError: a budget that is not above 0.
    """

    def __init__(self, subspace: Subspace, budget: float, *, transposed: bool = False) -> None:
        if not 0 < budget < float("inf"):
            raise ValueError(f"budget: expected a share above 0, got {budget}; for none at all take SubspaceProjection")
        super().__init__(Budget(budget), subspace, transposed=transposed)


class FittedLowRank(Fitted):
    """In force: the directions that a mask leaves to see.

    Attributes:
        given: the projection.
        whole: the subspace of the whole weight; ``seen``: that of the mask's columns.
        mask: None: all of the weight is stepped.
        index: the rows of P that are stepped; None: all.
        single: whether the mask is of single weights.
    """

    def __init__(self, given: LowRankProjection, whole: Subspace, seen: Subspace, mask: Mask | None) -> None:
        self.given, self.whole, self.seen, self.mask = given, whole, seen, mask
        self.single = mask is not None and not isinstance(mask, RowMask | ColumnMask)
        self.index = mask.index.to(whole.device).long() if isinstance(mask, RowMask) else None
        self.exact, self.alike = given.rule.exact, given.rule
        self.correction = LowRankCorrection
        self.free = not isinstance(given.rule, Hard) or seen.free > 0
        masked = "" if mask is None else " of its mask"
        self.spent = f"earlier domains use all directions{masked} ({whole.rank} of {whole.width})"

    @property
    def remembers(self) -> bool:
        return self.given.rule.remembers or self.single

    def continues(self, other: Fitted) -> bool:
        columns = [x.mask for x in (self, other) if isinstance(x, FittedLowRank) and isinstance(x.mask, ColumnMask)]
        return not self.remembers or not columns or (len(columns) == 2 and columns[0] == columns[1])

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        if not self.remembers:
            return {}
        found = {"moved": (shape[1 if self.given.transposed else 0], self.seen.rank), "held": ()}
        return found if self.given.rows is None else found | self.given.rows.shapes(tuple(shape))

    def begin(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        if not self.remembers:
            return {}
        found = {"held": self.held(weight)}
        if self.given.rows is not None:
            found |= self.given.rows.begin(weight)
        if self.given.from_zero:
            found["moved"] = weight.detach().to(dtype) @ self.seen.basis.to(dtype)
        return found

    def held(self, weight: Tensor) -> Tensor:
        """Σ_j λ_j ‖W u_j‖² of the whole weight: what its outputs on old inputs hold. 0-d, float64."""
        rows = weight.detach().to(self.whole.basis.dtype)
        return self.whole.energies(rows.mT if self.given.transposed else rows) @ self.whole.values.double()

    def drift(self, moved: Tensor, held: Tensor) -> Tensor:
        """Σ_j λ_j ‖P_j‖² / Σ_j λ_j ‖W₀ u_j‖²: the share of old outputs that has moved. 0-d, float64."""
        return energies(moved) @ self.seen.values.double() / held.clamp(min=torch.finfo(torch.float64).tiny)

    def rows(self, update: Tensor) -> Tensor:
        """A compact update as the rows that U is for: a view, or a copy of one that is cut to single weights."""
        if self.single:
            assert self.mask is not None
            dense = update.new_zeros(self.mask.shape)
            dense[self.mask.to(update.device).to_dense()] = update.view(-1)
            return dense
        return update.mT if self.given.transposed else update


class LowRankCorrection(Correction):
    """The two products of each layer, and the rule for all of them at once."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        self.rule: Rule = layers[0].projection.alike
        self.bases = [layer.projection.seen.basis.to(layer.update.dtype) for layer in layers]
        values = [layer.projection.seen.values.double() for layer in layers]
        self.strengths = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        zero = self.strengths.new_zeros(())
        self.held = torch.stack([layer.kept.get("held", zero) for layer in layers])
        self.next: list[Tensor] = []
        self.tables = [(layer, held) for layer in layers if (held := layer.projection.given.rows) is not None]

    def correct_(self, lr: float | Tensor, skipped: Tensor | None) -> None:
        for layer, held in self.tables:
            held.correct_(self.rule, layer, lr, skipped)
        rows = [layer.projection.rows(layer.update) for layer in self.layers]
        moved = [self._moved(layer) for layer in self.layers]
        # Not in place: should the step fail before the weights are written, P is still theirs.
        after = [
            row @ basis if before is None else torch.addmm(before, row, basis)
            for before, row, basis in zip(moved, rows, self.bases, strict=True)
        ]
        left = self._left(after, lr, skipped)
        dtype, self.next = rows[0].dtype, []
        parts = zip(self.layers, rows, self.bases, after, left.to(dtype), (1 - left).to(dtype), strict=True)
        for layer, row, basis, now, stays, taken in parts:
            rank = basis.shape[1]
            row.addmm_(now, (basis * taken[:rank]).mT, alpha=-1)
            if layer.projection.single:
                self.next.append(self._cut(layer, row, basis))
            elif "moved" in layer.kept:
                self.next.append(now.mul_(stays[:rank]))

    @staticmethod
    def _moved(layer: Layer) -> Tensor | None:
        """P of the rows that are stepped; None where it is zero."""
        moved, index = layer.kept.get("moved"), layer.projection.index
        return moved if moved is None or index is None else moved.index_select(0, index)

    def _left(self, after: list[Tensor], lr: float | Tensor, skipped: Tensor | None) -> Tensor:
        moved, room = self.strengths, self.held
        if isinstance(self.rule, Budget):
            moved = self._energies(after)
            room = self.rule.share * self.held - (self.strengths * self._frozen()).sum(1)
        left = self.rule.left(self.strengths, lr, moved, room)
        # Where a step is skipped, so is the pull.
        return left if skipped is None else torch.where(skipped == 0, left, 1.0)

    def _frozen(self) -> Tensor:
        """‖P_j‖² of the rows that a mask has left behind: (L, r)."""
        if all(layer.projection.index is None for layer in self.layers):
            return torch.zeros_like(self.strengths)
        parts = []
        for layer in self.layers:
            moved, index = layer.kept["moved"], layer.projection.index
            parts.append(moved[:0] if index is None else moved.index_fill(0, index, 0.0))
        return self._energies(parts)

    @staticmethod
    def _energies(parts: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([energies(part) for part in parts], batch_first=True)

    @staticmethod
    def _cut(layer: Layer, row: Tensor, basis: Tensor) -> Tensor:
        """Writes what a mask of single weights leaves of a corrected update; returns P with it."""
        support = layer.projection.mask.to(row.device).to_dense()
        layer.update.copy_(row[support].view(layer.update.shape))
        return torch.addmm(layer.kept["moved"], row.mul_(support), basis)

    def settle_(self) -> None:
        for layer, held in self.tables:
            held.settle_(layer)
        keeping = [layer.kept["moved"] for layer in self.layers if "moved" in layer.kept]
        indices = [layer.projection.index for layer in self.layers if "moved" in layer.kept]
        for moved, index, after in zip(keeping, indices, self.next, strict=True):
            if index is None:
                moved.copy_(after)
            else:
                moved.index_copy_(0, index, after)
        self.next = []


def energies(moved: Tensor) -> Tensor:
    """‖P_j‖² (r,) of P (m, r), in float64."""
    return torch.linalg.vector_norm(moved, dim=0).double().square()
