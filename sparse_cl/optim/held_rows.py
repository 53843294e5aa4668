"""The rules on the rows of a table: an embedding is a layer whose inputs are one-hot, so a used row is a direction."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_cl.subspace import UsedRows

from .projection import Layer
from .rules import Budget, Rule, energies


class HeldRows:
    """P_v = (W - W₀)_v for the rows v of a weight (V, n) that earlier domains look up, and the rule on them.

    It comes before the correction of the directions that the same weight, as a head, has of its inputs. Neither undoes
    the other: the second takes parts of every row of W - W₀ away and adds none.

    Attributes:
        index: (k,) int64.
        strengths: (k,) float64, what the rule means by them.
    """

    def __init__(self, rows: UsedRows, strengths: Tensor | None = None) -> None:
        self.index = rows.index
        self.strengths = (rows.values if strengths is None else strengths).double()

    def shapes(self, shape: tuple[int, ...], later: bool) -> dict[str, tuple[int, ...]]:
        """Of what is kept: P, or W₀ where weights are corrected later, of these rows, and their energy."""
        return {"origin_rows" if later else "rows": (len(self.index), shape[1]), "rows_held": ()}

    def begin(self, weight: Tensor, dtype: torch.dtype, later: bool) -> dict[str, Tensor]:
        rows = weight.detach()[self.index].to(dtype)
        return {"rows_held": self.strengths @ energies(rows.mT)} | ({"origin_rows": rows} if later else {})

    def moved(self, weight: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        """P (k, n), of the weight as it is now."""
        if "rows" in kept:
            return kept["rows"]
        return weight.detach()[self.index].to(kept["origin_rows"].dtype) - kept["origin_rows"]

    def drift(self, weight: Tensor, kept: Mapping[str, Tensor]) -> float:
        """Σ_v s_v ‖P_v‖² / Σ_v s_v ‖W₀_v‖². Waits for the device."""
        if not kept:
            return 0.0
        spent = self.strengths @ energies(self.moved(weight, kept).mT)
        return float(spent / kept["rows_held"].clamp(min=torch.finfo(torch.float64).tiny))

    def back(self, rule: Rule, layer: Layer, lr: float | Tensor, skipped: Tensor | None) -> Tensor:
        """What the rule takes back of the rows, (k, n): to be added to the update."""
        kept = layer.kept
        if "origin_rows" in kept:
            moved = self.moved(layer.weights()[1], kept)
        else:
            moved = layer.update.index_select(0, self.index)
            moved = moved + kept["rows"] if "rows" in kept else moved
        strengths = self.strengths / kept["scale"] if "scale" in kept else self.strengths
        held = kept.get("rows_held", self.strengths.new_zeros(()))
        room = rule.share * held if isinstance(rule, Budget) else held
        left = rule.left(strengths[None], lr, energies(moved.mT)[None], room[None])
        left = left if skipped is None else torch.where(skipped == 0, left, 1.0)
        return moved * (left - 1).to(moved.dtype).mT
