"""The rules on the rows of a table: an embedding is a layer whose inputs are one-hot, so a used row is a direction."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

import torch
from torch import Tensor

from sparse_cl.subspace import UsedRows

from .projection import Layer
from .rules import Budget, Rule, energies
from .shards import Piece, summed


class HeldRows:
    """P_v = (W - W₀)_v for the rows v of a weight (V, n) that earlier domains look up, and the rule on them.

    It comes before the correction of the directions that the same weight, as a head, has of its inputs. Neither undoes
    the other: the second takes parts of every row of W - W₀ away and adds none.

    Attributes:
        index: (k,) int64.
        strengths: (k,) float64, what the rule means by them.
        own: which of a whole table's used rows these are.
    """

    def __init__(self, rows: UsedRows, strengths: Tensor | None = None) -> None:
        self.index = rows.index
        self.strengths = (rows.values if strengths is None else strengths).double()
        self._piece: Piece | None = None
        self._all, self.own = self.strengths, slice(None)

    def part(self, piece: Piece | None) -> HeldRows:
        """The rows that this process holds of a table that is split over several."""
        if piece is None:
            return self
        found = copy(self)
        first, end = piece.offset[0], piece.offset[0] + piece.size[0]
        start, stop = (int((self.index < row).sum()) for row in (first, end))
        found._piece, found.own = piece, slice(start, stop)
        found.index, found.strengths = self.index[found.own] - first, self.strengths[found.own]
        return found

    def shapes(self, shape: tuple[int, ...], later: bool) -> dict[str, tuple[int, ...]]:
        """Of what is kept: P, or W₀ where weights are corrected later, of these rows, and their energy."""
        return {"origin_rows" if later else "rows": (len(self.index), shape[1]), "rows_held": ()}

    def begin(self, weight: Tensor, dtype: torch.dtype, later: bool) -> dict[str, Tensor]:
        rows = weight.detach()[self.index].to(dtype)
        held = summed(self.strengths @ energies(rows.mT), self._piece)
        return {"rows_held": held} | ({"origin_rows": rows} if later else {})

    def moved(self, weight: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        """P (k, n), of the weight as it is now."""
        if "rows" in kept:
            return kept["rows"]
        return weight.detach()[self.index].to(kept["origin_rows"].dtype) - kept["origin_rows"]

    def drift(self, weight: Tensor, kept: Mapping[str, Tensor]) -> float:
        """Σ_v s_v ‖P_v‖² / Σ_v s_v ‖W₀_v‖². Waits for the device."""
        if not kept:
            return 0.0
        spent = summed(self.strengths @ energies(self.moved(weight, kept).mT), self._piece)
        return float(spent / kept["rows_held"].clamp(min=torch.finfo(torch.float64).tiny))

    def back(self, rule: Rule, layer: Layer, lr: float | Tensor, skipped: Tensor | None) -> Tensor:
        """What the rule takes back of the rows, (k, n): to be added to the update."""
        kept = layer.kept
        if "origin_rows" in kept:
            moved = self.moved(layer.weights()[1], kept)
        else:
            moved = layer.update.index_select(0, self.index)
            moved = moved + kept["rows"] if "rows" in kept else moved
        strengths, own, spent = self.strengths, slice(None), energies(moved.mT)
        room = kept.get("rows_held", strengths.new_zeros(()))
        if isinstance(rule, Budget):
            room = rule.share * room
            if self._piece is not None:
                # What is left of one row depends on all rows.
                strengths, own = self._all, self.own
                every = torch.zeros_like(strengths)
                every[own] = spent
                spent = summed(every, self._piece)
        strengths = strengths / kept["scale"] if "scale" in kept else strengths
        left = rule.left(strengths[None], lr, spent[None], room[None])[:, own]
        left = left if skipped is None else torch.where(skipped == 0, left, 1.0)
        return moved * (left - 1).to(moved.dtype).mT
