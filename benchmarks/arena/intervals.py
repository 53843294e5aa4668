"""Means over seeds, with confidence intervals by Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtrit


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
    half = stdtrit(len(known) - 1, 0.975) * statistics.stdev(known) / math.sqrt(len(known))
    return Interval(mean, float(half), len(known))
