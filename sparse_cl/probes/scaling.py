"""The power of the width that a measure falls with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def fit_exponent(widths: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """b and its standard error in value = c · width^b, by least squares on logarithms.

    The error is the one of a straight line with independent residuals of one variance (n - 2 degrees of freedom): it
    knows of the scatter of seeds and of a curve that is not straight, not of what all models share.

    Args:
        widths, values: positive, one of each a model; several models may have one width.

    Raises:
        ValueError: fewer than three models or two widths; a number that is not positive and finite; unequal lengths.
    """
    if len(widths) != len(values):
        raise ValueError(f"values: expected one for each of the {len(widths)} widths, got {len(values)}")
    for name, numbers in (("widths", widths), ("values", values)):
        if not all(number > 0 and math.isfinite(number) for number in numbers):
            raise ValueError(f"{name}: expected positive numbers, which have a logarithm, got {list(numbers)}")
    if len(widths) < 3 or len(set(widths)) < 2:
        raise ValueError(
            f"widths: expected at least three models of at least two widths to fit a power, got widths {list(widths)}"
        )
    (slope, _), covariance = np.polyfit(np.log(widths), np.log(values), 1, cov=True)
    return float(slope), float(covariance[0, 0] ** 0.5)
