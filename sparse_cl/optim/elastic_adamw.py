"""AdamW that pulls each layer back along the directions that earlier domains use, or keeps it within a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sparse_cl.subspace import Subspace, SubspaceMemory, UsedRows

from .leaf import weight_of
from .low_rank import DriftBudget, FittedLowRank, LowRankProjection, LowRankPull, SubspaceProjection
from .memory_adamw import Bases, MemoryAdamW

STRENGTH = 1.0
"""ρ of the pull: how far the path that is left would be pulled back at mean use."""

ROW_STRENGTH = 0.05
"""Of the pull of an embedding's rows, beside that of layers' directions."""


class ElasticAdamW(MemoryAdamW):
    """:class:`ProjectedAdamW` that lets what earlier domains computed move only as far as you allow.

    Old inputs x of a layer have the energies λ_j along directions u_j (:class:`SubspaceMemory`). After AdamW's update
    comes, in these directions alone, either a pull back to where the weight was when the domain began,

        (W - W₀) u_j ← (W - W₀) u_j / (1 + lr κ_j),  κ_j = (strength / path) · λ_j / μ

    or the nearest point within a budget: Σ_j λ_j ‖(W - W₀) u_j‖² ≤ budget · Σ_j λ_j ‖W₀ u_j‖² for each layer, at every
    step. A pulled coordinate settles at 1/κ_j, whatever the rate; in units of the path Σ lr that the schedule allows in
    all, one strength does for all rates and lengths.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, capturable, masks, master_weights: as for
            :class:`SparseMaskedAdamW`.
        memory: as for :class:`SubspaceProjectedAdamW`.
        strength: ρ, at least 0; with ``path``. None and no budget: 1.
        path: Σ lr over the steps of the domain, as :func:`path_of` gives it.
        budget: a share, in place of a strength. 0 keeps out of the directions altogether.
        row_strength: of an embedding's rows, beside ``strength``: row v is pulled by its use, which is 1 for a row that
            one domain looks up as often as an average one. 0 leaves rows free; with a budget, any other number keeps
            them within it.
        rest: what happens to parameters without a basis: ``"train"`` or ``"freeze"``.
        every: as for :class:`SubspaceProjectedAdamW`; a pull takes the sum of the k rates. In between a budget may be
            exceeded.

    Raises:
        TypeError, ValueError: as there; a strength and a budget, or a strength without a path.
    """

    def __init__(
        self,
        params: ParamsT,
        *arguments: Any,
        memory: SubspaceMemory | Bases | None = None,
        strength: float | None = None,
        path: float | None = None,
        budget: float | None = None,
        row_strength: float = ROW_STRENGTH,
        rest: str = "train",
        **options: Any,
    ) -> None:
        self._rule = rule_of(strength, path, budget, row_strength)
        super().__init__(params, *arguments, memory=memory, rest=rest, **options)

    @torch.no_grad()
    def old_output_drift(self) -> dict[str, float]:
        """By parameter Σ_j λ_j ‖(W - W₀) u_j‖² / Σ_j λ_j ‖W₀ u_j‖²: how far old outputs have moved in this domain.

        A weight that is a head and an embedding has a second entry, ``"<name> (rows)"``. Of what the kept directions
        see, `Subspace.outside` says the rest. Waits for the device.
        """
        found: dict[str, float] = {}
        for param, fit in self._projections.items():
            if isinstance(fit, FittedLowRank) and param in self.state:
                kept, weight = self._kept(param), weight_of(param)
                whole = self._store.packed[param].wide(weight)[1] if fit.later else weight
                found |= drifts(self._store.name(param).strip("'"), fit, whole, kept)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rule": self._rule}

    def _holds_rows(self) -> bool:
        return super()._holds_rows() and self._rule.rows > 0

    def _projection(self, subspace: Subspace | Tensor, transposed: bool, rows: UsedRows | None) -> LowRankProjection:
        return projection_of(self._rule, subspace, transposed, rows)


def drifts(name: str, fit: FittedLowRank, weight: Tensor, kept: Mapping[str, Tensor]) -> dict[str, float]:
    """The drift of one parameter's outputs by directions and by rows, of what its projection keeps."""
    rows, found = fit.given.rows, {}
    if rows is None or fit.whole.rank:
        found[name] = fit.drift(weight, kept) if kept else 0.0
    if rows is not None:
        found[f"{name} (rows)" if found else name] = rows.drift(weight, kept)
    return found


def path_of(lr: float, steps: int, make_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None) -> float:
    """Σ of the learning rate over the steps of a schedule: what :class:`ElasticAdamW` takes as its path.

    Args:
        lr: peak learning rate.
        steps: optimizer steps.
        make_scheduler: makes any scheduler of ``torch.optim`` for an optimizer; None: the rate is constant.

    Raises:
        ValueError: no step.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if make_scheduler is None:
        return lr * steps
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, path = make_scheduler(optimizer), 0.0
    for _ in range(steps):
        path += optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
    return path


@dataclass(frozen=True)
class Asked:
    """What :func:`rule_of` made of the arguments: a budget, or a pull of so much per unit of the learning rate."""

    kind: str
    number: float
    rows: float


def rule_of(
    strength: float | None, path: float | None, budget: float | None, row_strength: float = ROW_STRENGTH
) -> Asked:
    """A budget, or the pull ρ / Σ lr.

    Raises:
        ValueError: both or neither of a budget and a path; numbers out of range.
    """
    if not 0 <= row_strength < float("inf"):
        raise ValueError(f"row_strength: expected a number of at least 0, got {row_strength}")
    if budget is not None:
        if strength is not None or path is not None:
            raise ValueError("budget: expected no strength and no path beside it; give one or the other")
        if not 0 <= budget < float("inf"):
            raise ValueError(f"budget: expected a share of at least 0, got {budget}")
        return Asked("budget", float(budget), row_strength)
    strength = STRENGTH if strength is None else strength
    if not 0 <= strength < float("inf"):
        raise ValueError(f"strength: expected a number of at least 0, got {strength}")
    if path is None or not 0 < path < float("inf"):
        raise ValueError(
            f"path: expected the sum of the learning rate over all steps of the domain, above 0, got {path}; give "
            "path=sparse_cl.path_of(lr, steps, make_scheduler), or lr * steps for a constant rate"
        )
    return Asked("pull", strength / path, row_strength)


def projection_of(
    asked: Asked, subspace: Subspace | Tensor, transposed: bool, rows: UsedRows | None
) -> LowRankProjection:
    """The projection of one parameter, by what :func:`rule_of` made of the arguments."""
    known, strengths = subspace if isinstance(subspace, Subspace) else Subspace(subspace), None
    found: LowRankProjection
    if asked.kind == "pull":
        found = LowRankPull(known, known.usage * asked.number, transposed=transposed)
        strengths = None if rows is None else rows.usage * (asked.number * asked.rows)
    elif asked.number == 0:
        found = SubspaceProjection(known, transposed=transposed)
    else:
        found = DriftBudget(known, asked.number, transposed=transposed)
    return found if rows is None else found.with_rows(rows, strengths)
