"""Keeping a weight where it was along the directions that earlier domains use: AdamW's update, then a correction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy

import torch
from torch import Tensor

from sparse_cl.layout import part
from sparse_cl.masks import ColumnMask, Mask, RowMask
from sparse_cl.reference.precision import full_precision
from sparse_cl.subspace import Subspace, UsedRows

from .held_rows import HeldRows
from .leaf import split_owner_of, whole_of
from .projection import Correction, Fitted, Layer, Projection
from .rules import Budget, Hard, Pull, Rule, energies
from .shards import Piece, piece_of, summed


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
    step out of P. Where steps are plain and the weights corrected later, it keeps W₀ U (``"projection.origin"``) in
    place of P, which is W U - W₀ U then.

    Args:
        rule: what of P a step leaves.
        subspace: U and λ, or a tensor U.
        strengths: (r,), what the rule means by them; None: λ.
        transposed: the weight is (n, m), as that of transformers' Conv1D.
        from_zero: W₀ is zero, as for the A of an adapter, whose change is all of it.
        relative: strengths are in units of 1 / the root mean square of the weight when the domain begins.

    Attributes:
        later: whether weights that have been stepped are corrected, not updates.

    Raises:
        TypeError, ValueError: a basis that is not orthonormal; strengths below 0, not finite, or of another number.
    """

    later = False

    def __init__(
        self,
        rule: Rule,
        subspace: Subspace | Tensor,
        strengths: Tensor | None = None,
        *,
        transposed: bool = False,
        from_zero: bool = False,
        relative: bool = False,
    ) -> None:
        found = subspace if isinstance(subspace, Subspace) else Subspace(subspace)
        if strengths is not None:
            try:
                found = Subspace(found.basis, strengths.to(found.basis.dtype))
            except ValueError as error:
                raise ValueError(str(error).replace("values:", "strengths:")) from None
        self.rule, self.subspace, self.transposed, self.from_zero = rule, found, transposed, from_zero
        self.rows: HeldRows | None = None
        self.relative = relative
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
        weight, subspace, piece, owner = whole_of(param), self.subspace, piece_of(param), split_owner_of(param)
        if piece is not None and (self.transposed or not piece.has_rows):
            raise ValueError(
                "is split over processes along its inputs, so that none of them knows how far it has moved along a "
                "direction; split it along its outputs, as fully_shard and ColwiseParallel do with a Linear"
            )
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
        if single and self.later:
            raise ValueError(
                f"has a {type(mask).__name__}, within which every step is corrected; take every=1, or a RowMask or "
                "ColumnMask"
            )
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
            columns = mask.index if owner is None else owner.mask.index
            seen = wanted.restricted(columns.to(subspace.device))
        found = FittedLowRank(self, subspace, seen, mask, piece)
        found.leaf = None if owner is None else param
        return found


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
        transposed, from_zero, relative: as for :class:`LowRankProjection`.
    """

    def __init__(
        self,
        subspace: Subspace | Tensor,
        strengths: Tensor | None = None,
        *,
        transposed: bool = False,
        from_zero: bool = False,
        relative: bool = False,
    ) -> None:
        if strengths is None and isinstance(subspace, Subspace):
            strengths = subspace.usage
        super().__init__(Pull(), subspace, strengths, transposed=transposed, from_zero=from_zero, relative=relative)


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
        piece: what this process holds of a weight that is split over several: its rows of P.
        leaf: a split leaf that is stepped; what is held is of the whole weight that it is a part of.
        table: of an embedding, the rows that are held.
        entries: the mask beside the weight, so that no step copies it there, if it is of single weights.
    """

    def __init__(
        self, given: LowRankProjection, whole: Subspace, seen: Subspace, mask: Mask | None, piece: Piece | None = None
    ) -> None:
        self.given, self.whole, self.seen, self.mask, self.piece = given, whole, seen, mask, piece
        self.leaf: Tensor | None = None
        self.table = None if given.rows is None else given.rows.part(piece)
        self.entries = None if mask is None or isinstance(mask, RowMask | ColumnMask) else mask.to(whole.device)
        self.index = mask.index.to(whole.device).long() if isinstance(mask, RowMask) else None
        self.exact, self.later, self.bounds = given.rule.exact, given.later, isinstance(given.rule, Budget)
        self.alike = given.rule, None if piece is None else piece.shared
        self.said = (
            "" if piece is None else f"{given.rule} of {whole.rank} directions, Σ {float(whole.values.sum()):.9g}"
        )
        self.correction = LowRankCorrection
        self.free = not isinstance(given.rule, Hard) or seen.free > 0
        masked = "" if mask is None else " of its mask"
        self.spent = f"earlier domains use all directions{masked} ({whole.rank} of {whole.width})"

    @property
    def remembers(self) -> bool:
        return self.given.rule.remembers or self.entries is not None or self.later

    def continues(self, other: Fitted) -> bool:
        columns = [x.mask for x in (self, other) if isinstance(x, FittedLowRank) and isinstance(x.mask, ColumnMask)]
        return not self.remembers or not columns or (len(columns) == 2 and columns[0] == columns[1])

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        if not self.remembers:
            return {}
        along = (shape[1 if self.given.transposed else 0], self.seen.rank)
        found = {"origin" if self.later else "moved": along, "held": ()} | (
            {"scale": ()} if self.given.relative else {}
        )
        return found if self.table is None else found | self.table.shapes(tuple(shape), self.later)

    def begin(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        if not self.remembers:
            return {}
        leaf = self.leaf
        layer, piece = (weight, self.piece) if leaf is None else (part(whole_of(leaf)), piece_of(whole_of(leaf)))
        found = {"held": self.held(layer, piece)}
        if self.given.relative:
            square = torch.linalg.vector_norm(layer.detach(), dtype=torch.float64).square()
            size = (summed(square, piece) / (layer.numel() if piece is None else math.prod(piece.shape))).sqrt()
            found["scale"] = torch.where(size > 0, size, 1.0)
        if self.table is not None:
            found |= self.table.begin(weight, dtype, self.later)
        if self.later != self.given.from_zero:
            found["origin" if self.later else "moved"] = self.along(weight, dtype)
        return found

    def along(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """W U (m, r) of the columns that are seen, in float32 products."""
        wide = weight.detach().to(dtype)
        rows = wide.mT if self.given.transposed else wide
        if isinstance(self.mask, ColumnMask):
            rows = rows.index_select(1, self.mask.index.to(rows.device))
        with full_precision(rows.device):
            return rows @ self.seen.basis.to(dtype)

    def moved(self, weight: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        """P (m, r), of the weight as it is now."""
        return kept["moved"] if "moved" in kept else self.along(weight, kept["origin"].dtype) - kept["origin"]

    def held(self, weight: Tensor, piece: Piece | None) -> Tensor:
        """Σ_j λ_j ‖W u_j‖² of the whole weight: what its outputs on old inputs hold. 0-d, float64."""
        rows = weight.detach().to(self.whole.basis.dtype)
        own = self.whole.energies(rows.mT if self.given.transposed else rows) @ self.whole.values.double()
        return summed(own, piece)

    def drift(self, weight: Tensor, kept: Mapping[str, Tensor]) -> float:
        """Σ_j λ_j ‖P_j‖² / Σ_j λ_j ‖W₀ u_j‖²: the share of old outputs that has moved. Waits for the device."""
        spent = summed(energies(self.moved(weight, kept)) @ self.seen.values.double(), self.piece)
        return float(spent / kept["held"].double().clamp(min=torch.finfo(torch.float64).tiny))

    def rows(self, update: Tensor) -> Tensor:
        """A compact update as the rows that U is for: a view, or a copy of one that is cut to single weights."""
        if self.entries is not None:
            dense = update.new_zeros(self.entries.shape)
            dense.view(-1).index_copy_(0, self.entries.positions(), update.view(-1))
            return dense
        return update.mT if self.given.transposed else update

    def cut_(self, rows: Tensor, update: Tensor) -> None:
        """Writes what a mask of single weights leaves of corrected rows, into the rows and into the compact update."""
        assert self.entries is not None
        positions, flat = self.entries.positions(), rows.view(-1)
        update.copy_(flat.index_select(0, positions).view(update.shape))
        flat.zero_().index_copy_(0, positions, update.view(-1))


class LowRankCorrection(Correction):
    """The two products of each layer, and the rule for all of them at once."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        self.rule: Rule = layers[0].projection.given.rule
        self.bases = [layer.projection.seen.basis.to(layer.update.dtype) for layer in layers]
        values = [layer.projection.seen.values.double() for layer in layers]
        self.strengths = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        zero, one = self.strengths.new_zeros(()), self.strengths.new_ones(())
        self.strengths = self.strengths / torch.stack([layer.kept.get("scale", one) for layer in layers])[:, None]
        self.held = torch.stack([layer.kept.get("held", zero) for layer in layers])
        self.next: list[Tensor] = []

    def correct_(self, lr: float | Tensor, skipped: Tensor | None) -> None:
        rows = [layer.projection.rows(layer.update) for layer in self.layers]
        later = self.layers[0].projection.later
        # What has been stepped without a correction is read off the weights, and the update is -C Uᵀ alone.
        wide = [layer.weights() for layer in self.layers] if later else []
        read = [x.projection.rows(w) for x, (w, _) in zip(self.layers, wide, strict=True)] if later else rows
        # The rows of tables come first; what they take back is part of what moves along the directions.
        tables = [
            (number, held.index, held.back(self.rule, layer, lr, skipped))
            for number, layer in enumerate(self.layers)
            if (held := layer.projection.table) is not None
        ]
        for number, index, back in () if later else tables:
            rows[number].index_add_(0, index, back)
        # Not in place: should the step fail before the weights are written, P is still theirs.
        after = [
            row @ basis if known is None else torch.addmm(known, row, basis, beta=-1 if later else 1)
            for known, row, basis in zip(map(self._known, self.layers), read, self.bases, strict=True)
        ]
        for number, index, back in tables if later else ():
            after[number].index_add_(0, index, back @ self.bases[number])
        left = self._left(after, lr, skipped, [whole for _, whole in wide])
        dtype, self.next = rows[0].dtype, []
        parts = zip(self.layers, rows, self.bases, after, left.to(dtype), (1 - left).to(dtype), strict=True)
        for layer, row, basis, now, stays, taken in parts:
            rank = basis.shape[1]
            row.addmm_(now, (basis * taken[:rank]).mT, beta=0 if later else 1, alpha=-1)
            if layer.projection.entries is not None:
                layer.projection.cut_(row, layer.update)
                self.next.append(torch.addmm(layer.kept["moved"], row, basis))
            elif "moved" in layer.kept:
                self.next.append(now.mul_(stays[:rank]))
        for number, index, back in tables if later else ():
            rows[number].index_add_(0, index, back)

    @staticmethod
    def _known(layer: Layer) -> Tensor | None:
        """P, or W₀ U, of the rows that are stepped; None where it is zero."""
        known, index = layer.kept.get("moved", layer.kept.get("origin")), layer.projection.index
        return known if known is None or index is None else known.index_select(0, index)

    def _left(
        self, after: list[Tensor], lr: float | Tensor, skipped: Tensor | None, weights: Sequence[Tensor]
    ) -> Tensor:
        moved, room = self.strengths, self.held
        if isinstance(self.rule, Budget):
            moved = self._energies(after)
            room = self.rule.share * self.held - (self.strengths * self._frozen(weights)).sum(1)
        left = self.rule.left(self.strengths, lr, moved, room)
        # Where a step is skipped, so is the pull.
        return left if skipped is None else torch.where(skipped == 0, left, 1.0)

    def _frozen(self, weights: Sequence[Tensor]) -> Tensor:
        """‖P_j‖² of the rows that a mask has left behind: (L, r)."""
        if all(layer.projection.index is None for layer in self.layers):
            return torch.zeros_like(self.strengths)
        parts = []
        for number, (layer, basis) in enumerate(zip(self.layers, self.bases, strict=True)):
            fit, kept = layer.projection, layer.kept
            if fit.index is None:
                parts.append(basis.new_zeros(0, basis.shape[1]))
            else:
                moved = fit.moved(weights[number], kept) if fit.later else kept["moved"]
                parts.append(moved.index_fill(0, fit.index, 0.0))
        return self._energies(parts)

    def _energies(self, parts: list[Tensor]) -> Tensor:
        own = torch.nn.utils.rnn.pad_sequence([energies(part) for part in parts], batch_first=True)
        return summed(own, self.layers[0].projection.piece)

    def settle_(self) -> None:
        for layer in self.layers:
            if "rows" in layer.kept:
                layer.kept["rows"] += layer.update.index_select(0, layer.projection.table.index)
        keeping = [layer.kept["moved"] for layer in self.layers if "moved" in layer.kept]
        indices = [layer.projection.index for layer in self.layers if "moved" in layer.kept]
        for moved, index, after in zip(keeping, indices, self.next, strict=True):
            if index is None:
                moved.copy_(after)
            else:
                moved.index_copy_(0, index, after)
        self.next = []
