"""The rules on the rows of a table: an embedding is a layer whose inputs are one-hot, so a used row is a direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_cl.subspace import UsedRows

from .projection import Layer
from .rules import Budget, Rule


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

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"rows": (len(self.index), shape[1]), "rows_held": ()}

    def begin(self, weight: Tensor) -> dict[str, Tensor]:
        """Σ_v s_v ‖W_v‖²: 0-d, float64."""
        return {"rows_held": self.strengths @ squared(weight.detach()[self.index])}

    def drift(self, moved: Tensor, held: Tensor) -> Tensor:
        """Σ_v s_v ‖P_v‖² / Σ_v s_v ‖W₀_v‖²: 0-d, float64."""
        return self.strengths @ squared(moved) / held.clamp(min=torch.finfo(torch.float64).tiny)

    def left(self, rule: Rule, moved: Tensor, held: Tensor, lr: Any) -> Tensor:
        """What the rule leaves of each P_v, as a share (k, 1) in the dtype of ``moved``."""
        room = rule.share * held if isinstance(rule, Budget) else held
        left = rule.left(self.strengths[None], lr, squared(moved)[None], room[None])
        return left.to(moved.dtype).mT

    def correct_(self, rule: Rule, layer: Layer, lr: float | Tensor, skipped: Tensor | None) -> None:
        """Corrects the rows of an update in place."""
        before = layer.kept.get("rows")
        moved = layer.update.index_select(0, self.index)
        if before is not None:
            moved += before
        held = layer.kept["rows_held"] if before is not None else self.strengths.new_zeros(())
        left = self.left(rule, moved, held, lr)
        moved *= left if skipped is None else torch.where(skipped == 0, left, 1.0)
        layer.update.index_copy_(0, self.index, moved if before is None else moved - before)

    def settle_(self, layer: Layer) -> None:
        if "rows" in layer.kept:
            layer.kept["rows"] += layer.update.index_select(0, self.index)


def squared(rows: Tensor) -> Tensor:
    """‖x‖² (k,) of rows (k, n), in float64."""
    return torch.linalg.vector_norm(rows, dim=1).double().square()
