"""Layers along the x-axis of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TICKS = 13


def label_layers(axis: Axes, names: Sequence[str]) -> None:
    """Ticks at 0, 1, …, called by what is not the same in all names; some only, where there are many."""
    short = [name.removesuffix(".weight") for name in names]
    if len(short) > 1:
        before = commonprefix([name.split(".") for name in short])
        after = commonprefix([name.split(".")[::-1] for name in short])
        short = [".".join(name.split(".")[len(before) : len(name.split(".")) - len(after)]) for name in short]
    step = -(-len(names) // _TICKS)
    places = range(0, len(names), step)
    axis.set_xticks(list(places), [short[i] for i in places], fontsize=8)
    axis.set_xlabel("block" if all(name.isdigit() for name in short) else "layer", fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
