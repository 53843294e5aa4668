"""What methods lose at equal learning, by their curves over the learning rate.

At a higher rate a method learns more and forgets more. Two methods are compared over the learning that both reach: the
area between their curves, share lost over bits per byte learned, divided by its width. Curves may cross, so that the
difference where both have learned least is told beside it; of a method with one rate there is no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from sparse_cl.four_domains.evaluate import METRICS

from .compare import Comparison, Row
from .intervals import Interval, interval
from .pareto import lines_of, name_of

Curve = tuple[Sequence[float], Sequence[float]]
"""Learned, rising, and the share of it that was lost."""


@dataclass(frozen=True)
class Beside:
    """A curve beside another one.

    Attributes:
        more: share of the gain that it loses more, mean over the learning that both reach; over seeds, each with its
            mean over the orders. None: there is no such learning in any seed.
        least: the same where both have learned least.
        learned: the least and the most that both reach, means over seeds and orders.
        most: learned at its best rate, mean over seeds and orders; None: every run failed or learned nothing.
    """

    name: str
    more: Interval | None
    least: Interval | None
    learned: tuple[float, float] | None
    most: float | None


def lines_over_rates(compared: Comparison) -> list[list[Row]]:
    """Rows that differ in the learning rate alone, by rising rate; of methods with several rates, and no bounds, which
    forget nothing or all at once."""
    return [line for line in lines_of(compared.rows) if len(line) > 1 and line[0].kind != "bound"]


def curve(line: Sequence[Row], order: str, seed: int) -> Curve:
    """Of the runs of one order and seed, up to the rate that learns most; a rate that learns less than a lower one, or
    nothing, is left out."""
    learned: list[float] = []
    lost: list[float] = []
    for row in line:
        found = row.runs.get((order, seed), {}).get(METRICS[0])
        if found and found["gain_lost"] is not None and (not learned or found["learned"] > learned[-1]):
            learned.append(found["learned"])
            lost.append(found["gain_lost"])
    return learned, lost


def gap(one: Curve, other: Curve) -> tuple[float, float, float, float] | None:
    """Mean difference of what is lost over the learning that both reach, that at its lower end, and both ends; None:
    there is no such learning."""
    if not one[0] or not other[0]:
        return None
    low, high = max(one[0][0], other[0][0]), min(one[0][-1], other[0][-1])
    if low > high:
        return None
    at = np.unique([low, high, *one[0], *other[0]])
    at = at[(at >= low) & (at <= high)]
    apart = np.interp(at, *one) - np.interp(at, *other)
    mean = float(np.trapezoid(apart, at) / (high - low)) if low < high else float(apart[0])
    return mean, float(apart[0]), low, high


def beside(line: Sequence[Row], other: Sequence[Row], orders: Sequence[str]) -> Beside:
    """A line beside another one, paired by order and seed."""
    differences, least, ends, most = [], [], [], []
    for seed in sorted({seed for row in line for _, seed in row.runs}):
        gaps = [gap(curve(line, order, seed), curve(other, order, seed)) for order in orders]
        most += [max(learned) for order in orders if (learned := curve(line, order, seed)[0])]
        if None not in gaps:
            differences.append(fmean(found[0] for found in gaps if found))
            least.append(fmean(found[1] for found in gaps if found))
            ends += [found[2:] for found in gaps if found]
    learned = (fmean(low for low, _ in ends), fmean(high for _, high in ends)) if ends else None
    return Beside(name_of(line), interval(differences), interval(least), learned, fmean(most) if most else None)


def at_equal_learning(compared: Comparison) -> list[Beside]:
    """Each line over rates beside the first one."""
    first, *others = lines_over_rates(compared) or [[]]
    return [beside(line, first, compared.orders) for line in others]
