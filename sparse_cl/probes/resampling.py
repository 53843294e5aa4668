"""Resampling of groups of sequences: intervals and split halves of what was summed by group."""

from __future__ import annotations

import torch
from torch import Tensor

GROUPS = 16
"""Groups that a run's sequences are dealt to, in turn."""


def resamples(groups: int, count: int, generator: torch.Generator) -> Tensor:
    """(count, groups) float64: how often each group is drawn, with replacement, in all one time less than there are.

    One less, so that means of resamples vary as much as means of fresh groups would (Rao & Wu 1988).
    """
    drawn = torch.randint(groups, (count, groups - 1), generator=generator)
    return torch.zeros(count, groups, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones_like(drawn, dtype=torch.float64)
    )


def halves(groups: int, count: int, generator: torch.Generator) -> Tensor:
    """(count, groups) float64, ones and zeros: random halves of the groups; what is left is the other half.

    Raises:
        ValueError: one group cannot be split.
    """
    if groups < 2:
        raise ValueError(f"groups: expected at least 2, got {groups}; give more sequences")
    order = torch.rand(count, groups, generator=generator, dtype=torch.float64).argsort(1)
    return (order < groups // 2).double()


def reflected_interval(
    estimate: Tensor, resampled: Tensor, low: float = 0.0, high: float = 1.0, level: float = 0.95
) -> Tensor:
    """The basic bootstrap interval [2θ - q(97.5 %), 2θ - q(2.5 %)], clipped (Davison & Hinkley 1997, section 5.2).

    For statistics that change smoothly with the data: means, shares of many.

    Args:
        estimate: (...).
        resampled: (count, ...).

    Returns:
        (..., 2).
    """
    tails = torch.tensor([(1 + level) / 2, (1 - level) / 2], dtype=resampled.dtype)
    quantiles = torch.quantile(resampled, tails, dim=0)
    return (2 * estimate - quantiles).movedim(0, -1).clamp(low, high)


def top_set_interval(estimate: Tensor, resampled: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """About 95 %, for statistics of top sets: θ - b ± 1.96 √(s² + 2 b²), clipped; b and s: the resamples' bias, spread.

    Noise lowers the overlap of top sets, and resampling adds the noise once more: b says how much that is, but only
    roughly, since the second helping of noise lowers less than the first; hence 2 b² in the width. Against populations
    of known overlap this holds 84 to 95 of 100 true values from 100 to 700 neurons and at any noise; the basic
    bootstrap interval holds 40 to 78, percentiles 0 to 98.

    Args:
        estimate, resampled: as for `reflected_interval`.

    Returns:
        (..., 2).
    """
    bias = resampled.mean(0) - estimate
    reach = 1.96 * (resampled.var(0) + 2 * bias.square()).sqrt()
    return torch.stack([estimate - bias - reach, estimate - bias + reach], -1).clamp(low, high)
