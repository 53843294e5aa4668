"""Resampling of groups of sequences: intervals and split halves of what was summed by group."""

from __future__ import annotations

import torch
from torch import Tensor

GROUPS = 16
"""Groups that a run's sequences are dealt to, in turn."""


def resamples(groups: int, count: int, generator: torch.Generator) -> Tensor:
    """(count, groups) float64: how often each group is drawn when as many as there are are drawn with replacement."""
    drawn = torch.randint(groups, (count, groups), generator=generator)
    return torch.zeros(count, groups, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(count, groups, dtype=torch.float64)
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
    estimate: Tensor, resampled: Tensor, low: float | None = 0.0, high: float | None = 1.0, level: float = 0.95
) -> Tensor:
    """The basic bootstrap interval [2θ - q(97.5 %), 2θ - q(2.5 %)], clipped (Davison & Hinkley 1997, section 5.2).

    Resampling adds the noise of the data once more. Where noise biases a statistic, as it lowers the overlap of top
    sets, percentiles of the resamples carry that bias twice; reflecting them at the estimate takes it out.

    Args:
        estimate: (...).
        resampled: (count, ...).

    Returns:
        (..., 2).
    """
    tails = torch.tensor([(1 + level) / 2, (1 - level) / 2], dtype=resampled.dtype)
    quantiles = torch.quantile(resampled, tails, dim=0)
    interval = (2 * estimate - quantiles).movedim(0, -1)
    return interval if low is None and high is None else interval.clamp(low, high)
