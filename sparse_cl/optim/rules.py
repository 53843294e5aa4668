"""How much of what a weight moved along old directions a step takes back: three rules.

P = (W - W₀) U is how far W (m, n) has moved along the directions U (n, r) since the domain began. A rule gives for each
direction the share of P_j that stays; all three work on (L, r) numbers, of L layers at once, in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

#: Newton steps for the multiplier of a budget, which converge from one side; what is then left is scaled away.
_NEWTON = 8

#: A radius that is 0 for all purposes, and can be divided by.
_LEAST = 1e-100


def energies(moved: Tensor) -> Tensor:
    """‖P_j‖² (r,) of P (m, r), in float64."""
    return torch.linalg.vector_norm(moved, dim=0).double().square()


class Rule(ABC):
    """One of the three.

    Attributes:
        exact: whether its products need float32 where the caller allows less.
        remembers: whether P may be other than zero after a step.
    """

    exact: bool = False
    remembers: bool = True

    @abstractmethod
    def left(self, strengths: Tensor, lr: float | Tensor, energies: Tensor, room: Tensor) -> Tensor:
        """What is left of P_j, as a share in [0, 1]: (L, r).

        Args:
            strengths: (L, r), at least 0; 0 where a layer has no such direction.
            lr: the learning rate in force.
            energies: (L, r), ‖P_j‖², with the step's update in P.
            room: (L,), what Σ_j strengths_j ‖P_j‖² may be, of a budget.
        """


@dataclass(frozen=True)
class Hard(Rule):
    """P ← 0: the weight does not move along old directions at all (GPM, Saha, Garg & Roy 2021)."""

    exact = True
    remembers = False

    def left(self, strengths: Tensor, lr: float | Tensor, energies: Tensor, room: Tensor) -> Tensor:
        return torch.zeros_like(strengths)


@dataclass(frozen=True)
class Pull(Rule):
    """P_j ← P_j / (1 + lr κ_j), with κ the strengths: the proximal step of ½ Σ κ_j ‖P_j‖².

    Consistent gradients override the pull; noise is undone. Pushed by lr a step on and on, a weight settles about 1/κ_j
    from where it was, and P_j within ‖u_j‖₁/κ_j (√n/κ_j where rows have one second moment), whatever the rate.
    """

    def left(self, strengths: Tensor, lr: float | Tensor, energies: Tensor, room: Tensor) -> Tensor:
        return (1 + strengths * lr).reciprocal_()


@dataclass(frozen=True)
class Budget(Rule):
    """P ← the nearest P with Σ_j λ_j ‖P_j‖² ≤ share · Σ_j λ_j ‖W₀ u_j‖², with λ the strengths.

    So no layer's output on old inputs moves by more than this share of its energy, as far as the kept directions see
    it. P_j ← P_j / (1 + ν λ_j), ν by Newton's method on the reciprocal of the norm (Moré & Sorensen 1983).
    """

    share: float

    def left(self, strengths: Tensor, lr: float | Tensor, energies: Tensor, room: Tensor) -> Tensor:
        moved, radius = strengths * energies, room.clamp(min=0).sqrt().clamp(min=_LEAST)[:, None]
        nu = torch.zeros_like(radius)
        for _ in range(_NEWTON):
            share = (1 + nu * strengths).reciprocal_()
            squared = (moved * share.square()).sum(1, keepdim=True)
            slope = (moved * strengths * share**3).sum(1, keepdim=True)
            norm = squared.sqrt()
            step = squared / slope * (norm - radius) / radius
            nu = torch.where((norm > radius) & (slope > 0), nu + step, nu)
        share = (1 + nu * strengths).reciprocal_()
        norm = (moved * share.square()).sum(1, keepdim=True).sqrt()
        return share * torch.where(norm > radius, radius / norm, 1.0)
