"""What the pictures of several sections share."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from sparse_cl.four_domains import figures

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TICKS = 13


def new_figure(rows: int = 1, columns: int = 1, height: float = 3.0, alone: float = 5.0) -> tuple[Figure, np.ndarray]:
    """A figure with small ticks and its axes, a (rows, columns) array, as wide as a page.

    Args:
        height: of one of the axes, in inches.
        alone: width of a single column, in inches.
    """
    figure, axes = figures.new_figure(rows, columns, alone if columns == 1 else None, height)
    for axis in axes.flat:
        axis.tick_params(labelsize=8)
    return figure, axes


def new_grid(count: int, alone: float = 5.0) -> tuple[Figure, list[Axes]]:
    """A figure with axes for so many panels, at most three to a row. `alone` as for `new_figure`."""
    columns = min(3, count)
    figure, axes = new_figure(-(-count // columns), columns, 2.6, alone)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


def label(axis: Axes, x: str | None = None, y: str | None = None, title: str | None = None) -> None:
    """Says what stands along the axes, and above them."""
    if x is not None:
        axis.set_xlabel(x, fontsize=8)
    if y is not None:
        axis.set_ylabel(y, fontsize=8)
    if title is not None:
        axis.set_title(title, fontsize=9)


def label_layers(axis: Axes, names: Sequence[str]) -> None:
    """Ticks at 0, 1, …, called by what is not the same in all names; some only, where there are many."""
    short = [name.removesuffix(".weight") for name in names]
    if len(short) > 1:
        before = commonprefix([name.split(".") for name in short])
        after = commonprefix([name.split(".")[::-1] for name in short])
        short = [".".join(name.split(".")[len(before) : len(name.split(".")) - len(after)]) for name in short]
    places = range(0, len(names), -(-len(names) // _TICKS))
    axis.set_xticks(list(places), [short[i] for i in places], fontsize=8)
    axis.set_xlabel("block" if all(name.isdigit() for name in short) else "layer", fontsize=8)


def legend_above(figure: Figure, axis: Axes, most: int = 100) -> None:
    """The legend of one of the axes above all of them, at most so many entries to a row."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(most, len(labels)), fontsize=8)


def bands(axis: Axes, intervals: Sequence[Sequence[float]], **look: Any) -> None:
    """An interval at each place 0, 1, …, drawn as a step as wide as the place."""
    lows, highs = zip(*intervals, strict=True)
    axis.stairs(highs, [i - 0.5 for i in range(len(highs) + 1)], baseline=lows, **look)


def bars(values: Sequence[float], intervals: Sequence[Sequence[float] | None]) -> list[list[float]] | None:
    """Lengths of error bars, below and above; None where an interval is not known."""
    known = [interval for interval in intervals if interval is not None]
    if len(known) < len(intervals):
        return None
    # A reflected interval need not hold its estimate; an error bar must.
    return [
        [max(0.0, value - low) for value, (low, _) in zip(values, known, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(values, known, strict=True)],
    ]


def beside(number: int, count: int, places: int, gap: float) -> list[float]:
    """Where series `number` of `count` stands at each of the places 0, 1, …, so that none hides another."""
    return [place + gap * (number - (count - 1) / 2) for place in range(places)]
