"""The picture of a comparison: what methods learned against what they forgot, through their learning rates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_cl.four_domains.figures import new_figure

from .compare import Comparison, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = {
    **{"ours": ("o", "-", "full"), "baseline": ("s", "--", "none"), "bound": ("^", ":", "full")},
    "null": ("x", "-.", "full"),
}
"""Kind → marker, line and filling: the kinds can be told apart without colours, and each has all of them."""


def lines_of(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in the learning rate alone, by rising rate."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        others = {name: value for name, value in row.settings.items() if name != "lr"}
        groups.setdefault(json.dumps([row.method, others], sort_keys=True), []).append(row)
    return [sorted(group, key=lambda row: row.settings["lr"]) for group in groups.values()]


def name_of(line: Sequence[Row]) -> str:
    """The method and its settings, without a rate."""
    return " ".join(word for word in line[0].name.split() if not word.startswith("lr="))


FORGOTTEN = {
    "forgetting": "forgetting (bits per byte; less is better)",
    "gain_lost": "lost, share of the gain (less is better)",
}


def draw_pareto(compared: Comparison, path: Path, forgotten: str = "forgetting", of: str = "domains") -> None:
    """A column an order, and one for all together; bars are 95 % intervals over seeds.

    Args:
        forgotten: of `FORGOTTEN`, what is drawn upwards.
        of: what learned is the mean over, in words.
    """
    sections = compared.sections()
    figure, axes = new_figure(1, len(sections), 9.0 if len(sections) == 1 else 5.0, 5.0)
    for axis in axes[0][1:]:
        axis.sharex(axes[0][0])
        axis.sharey(axes[0][0])
    for axis, section in zip(axes[0], sections, strict=True):
        _draw(axis, compared, section, forgotten)
        axis.set_title(section, fontsize=9)
        axis.set_xlabel(f"learned (bits per byte, mean over {of}; more is better)", fontsize=9)
    axes[0][0].set_ylabel(FORGOTTEN[forgotten], fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    for axis in axes[0][1:]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    if handles:
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)


def _draw(axis: Axes, compared: Comparison, section: str, forgotten: str) -> None:
    from matplotlib import colormaps

    colours = [*colormaps["tab10"].colors, "black"]
    used = dict.fromkeys(STYLES, 0)
    for group in lines_of(compared.rows):
        kind = group[0].kind
        colour = colours[used[kind] % len(colours)]
        used[kind] += 1
        points = [(row, *(compared.get(row, section, name) for name in ("learned", forgotten))) for row in group]
        points = [point for point in points if None not in point]
        if not points:
            continue
        rows, learned, lost = zip(*points, strict=True)
        marker, line, fill = STYLES[kind]
        axis.errorbar(
            [x.mean for x in learned],
            [y.mean for y in lost],
            xerr=[x.half_width or 0.0 for x in learned],
            yerr=[y.half_width or 0.0 for y in lost],
            marker=marker,
            linestyle=line,
            fillstyle=fill,
            color=colour,
            label=f"{name_of(rows)} ({kind})",
            markersize=6,
            linewidth=1,
            elinewidth=0.7,
        )
        if len(rows) > 1:
            for row, x, y in points:
                rate = f"{row.settings['lr']:g}"
                axis.annotate(rate, (x.mean, y.mean), textcoords="offset points", xytext=(4, 4), fontsize=6)
    axis.axhline(0, color="grey", linewidth=0.5)
