"""AdamW that pulls each layer back along the directions that earlier domains use, or keeps it within a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sparse_cl.subspace import Subspace, SubspaceMemory

from .leaf import weight_of
from .low_rank import DriftBudget, FittedLowRank, LowRankProjection, LowRankPull, SubspaceProjection
from .memory_adamw import Bases, Known, MemoryAdamW
from .names import label_of

STRENGTH = 20.0
"""Of the pull: a weight goes about a twentieth of its size along a direction of mean use."""

ROW_STRENGTH = 0.05
"""Of the pull of an embedding's rows, beside that of layers' directions."""


class ElasticAdamW(MemoryAdamW):
    """:class:`ProjectedAdamW` that lets what earlier domains computed move only as far as you allow.

    Old inputs x of a layer have the energies λ_j along directions u_j (:class:`SubspaceMemory`). After AdamW's update
    comes, in these directions alone, either a pull back to where the weight was when the domain began,

        (W - W₀) u_j ← (W - W₀) u_j / (1 + lr κ_j),  κ_j = (strength / rms W₀) · λ_j / μ

    or the nearest point within a budget: Σ_j λ_j ‖(W - W₀) u_j‖² ≤ budget · Σ_j λ_j ‖W₀ u_j‖² for each layer, at every
    step. A weight that AdamW pushes by lr each step settles about 1/κ_j from where it was, and (W - W₀) u_j within
    √n/κ_j, whatever the rate and the number of steps.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, capturable, masks, master_weights: as for
            :class:`SparseMaskedAdamW`.
        memory: as for :class:`SubspaceProjectedAdamW`.
        strength: s, at least 0: along a direction of use u = λ_j / μ, 1 for one that a domain uses as much as an
            average one, a weight that AdamW pushes on and on stops after about 1 / (s u) of the root mean
            square of its matrix. None and no budget: 20.
        budget: a share, in place of a strength. 0 keeps out of the directions altogether.
        row_strength: of an embedding's rows, beside ``strength``: row v is pulled by its use, which is 1 for a row that
            one domain looks up as often as an average one. 0 leaves rows free; with a budget, any other number keeps
            them within it.
        rest: what happens to parameters without a basis: ``"train"`` or ``"freeze"``.
        every: as for :class:`SubspaceProjectedAdamW`; a pull takes the sum of the k rates. In between a budget may be
            exceeded.
        second_moment: as for :class:`SparseMaskedAdamW`, but ``"row"`` unless said otherwise. AdamW's division by entry
            gives entries of all sizes one size, and so spreads an update over directions that old inputs use a little
            and new ones hardly; divided by row it stays in the span of the new inputs.

    Raises:
        TypeError, ValueError: as there; a strength and a budget.
    """

    def __init__(
        self,
        params: ParamsT,
        *arguments: Any,
        memory: SubspaceMemory | Bases | None = None,
        strength: float | None = None,
        budget: float | None = None,
        row_strength: float = ROW_STRENGTH,
        rest: str = "train",
        **options: Any,
    ) -> None:
        self._rule = rule_of(strength, budget, row_strength)
        options.setdefault("second_moment", "row")
        super().__init__(params, *arguments, memory=memory, rest=rest, **options)

    @torch.no_grad()
    def old_output_drift(self) -> dict[str, float]:
        """By parameter Σ_j λ_j ‖(W - W₀) u_j‖² / Σ_j λ_j ‖W₀ u_j‖²: how far old outputs have moved in this domain.

        A weight that is a head and an embedding has a second entry, ``"<name> (rows)"``. Of what the kept directions
        see, `Subspace.outside` says the rest. Waits for the device.
        """
        found: dict[str, float] = {}
        for param, fit in self._projections.items():
            if isinstance(fit, FittedLowRank) and self.state.get(param):
                kept, weight = self._kept(param), weight_of(param)
                whole = self._store.ready(param).wide(weight)[1] if fit.later else weight
                found |= drifts(label_of(self.param_groups, param), fit, whole, kept)
        return found

    @property
    def rule(self) -> Asked:
        """What was asked for: a strength or a budget."""
        return self._rule

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rule": self._rule}

    def _holds_rows(self) -> bool:
        return super()._holds_rows() and self._rule.rows > 0

    def _projection(self, known: Known) -> LowRankProjection:
        return projection_of(self._rule, known)


def drifts(name: str, fit: FittedLowRank, weight: Tensor, kept: Mapping[str, Tensor]) -> dict[str, float]:
    """The drift of one parameter's outputs by directions and by rows, of what its projection keeps."""
    rows, found = fit.table, {}
    if rows is None or fit.whole.rank:
        found[name] = fit.drift(weight, kept) if kept else 0.0
    if rows is not None:
        found[f"{name} (rows)" if found else name] = rows.drift(weight, kept)
    return found


@dataclass(frozen=True)
class Asked:
    """What was asked for: a "budget", or a "pull" of this strength; and how strongly rows are held beside it."""

    kind: str
    number: float
    rows: float


def rule_of(strength: float | None, budget: float | None, row_strength: float) -> Asked:
    """What the arguments ask for.

    Raises:
        ValueError: both a budget and a strength; numbers out of range.
    """
    if not 0 <= row_strength < float("inf"):
        raise ValueError(f"row_strength: expected a number of at least 0, got {row_strength}")
    if budget is not None:
        if strength is not None:
            raise ValueError("budget: expected no strength beside it; give one or the other")
        if not 0 <= budget < float("inf"):
            raise ValueError(f"budget: expected a share of at least 0, got {budget}")
        return Asked("budget", float(budget), row_strength)
    strength = STRENGTH if strength is None else strength
    if not 0 <= strength < float("inf"):
        raise ValueError(f"strength: expected a number of at least 0, got {strength}")
    return Asked("pull", float(strength), row_strength)


def projection_of(asked: Asked, known: Known) -> LowRankProjection:
    """The projection of one parameter."""
    subspace = known.subspace if isinstance(known.subspace, Subspace) else Subspace(known.subspace)
    rows, strengths = known.rows, None
    found: LowRankProjection
    if asked.kind == "pull":
        found = LowRankPull(subspace, subspace.usage * asked.number, transposed=known.transposed, relative=True)
        strengths = None if rows is None else rows.usage * (asked.number * asked.rows)
    elif asked.number == 0:
        found = SubspaceProjection(subspace, transposed=known.transposed)
    else:
        found = DriftBudget(subspace, asked.number, transposed=known.transposed)
    return found if rows is None else found.with_rows(rows, strengths)
