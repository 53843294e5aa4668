"""Means over seeds, with confidence intervals by Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_Z = statistics.NormalDist().inv_cdf(0.975)
# Quantiles by degrees of freedom; from 11 on the expansion below has three decimals right.
_T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def t975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 3 decimals (Abramowitz & Stegun 26.7.5 for many degrees of freedom)."""
    if freedom < 1:
        raise ValueError(f"freedom: expected at least 1, got {freedom}")
    if freedom <= len(_T975):
        return _T975[freedom - 1]
    z, v = _Z, freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / v + second / v**2 + third / v**3


@dataclass(frozen=True)
class Interval:
    """mean ± half_width is a 95 % interval of the mean over `count` seeds; no half_width with one."""

    mean: float
    half_width: float | None
    count: int

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def interval(values: Sequence[float | None]) -> Interval | None:
    """Of the values that are known; None: there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean = statistics.fmean(known)
    if len(known) < 2:
        return Interval(mean, None, 1)
    half = t975(len(known) - 1) * statistics.stdev(known) / math.sqrt(len(known))
    return Interval(mean, half, len(known))
