"""Checks of the numbers that constructors of methods take."""

from __future__ import annotations

import math
from typing import TypeVar

Number = TypeVar("Number", int, float)


def check_share(name: str, value: float, *, one: bool = True) -> float:
    """`value`, if it is a share in (0, 1], or in (0, 1) where all of it makes no sense.

    Raises:
        ValueError: it is not; `name` is the argument's.
    """
    if not (0 < value < 1 or (one and value == 1)):
        raise ValueError(f"{name}: expected a share in (0, 1{']' if one else ')'}, got {value}")
    return value


def check_above_zero(name: str, value: float) -> float:
    """`value`, if it is a finite number above 0.

    Raises:
        ValueError: it is not; `name` is the argument's.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a number above 0, got {value}")
    return value


def check_at_least(name: str, value: Number, least: float) -> Number:
    """`value`, if it is a finite number of at least `least`.

    Raises:
        ValueError: it is not; `name` is the argument's.
    """
    if not least <= value < math.inf:
        raise ValueError(f"{name}: expected a number of at least {least}, got {value}")
    return value
