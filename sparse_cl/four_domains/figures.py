"""Pictures of a run: R of each method, each domain's score through the stages, and the capacity of the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .metrics import LOWER_IS_BETTER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {
    "bits_per_byte": "bits per byte of the response (lower is better)",
    "accuracy": "accuracy by likelihood (higher is better)",
    "exact_match": "exact match of the answer (higher is better)",
}
PAGE_WIDTH = 10.0
"""Inches: what a page or a report is wide."""


def new_figure(
    rows: int = 1, columns: int = 1, width: float | None = None, height: float = 3.0
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, a (rows, columns) array; `width` and `height` are inches of one of the axes.

    Args:
        width: None: so that the columns fill a page.
    """
    # The object interface: no global state, and no display needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = PAGE_WIDTH / columns if width is None else width
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_matrices(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """R as a heat map, a column a method, a row a metric. Boxed: the domain that was just learned."""
    from matplotlib.patches import Rectangle

    metrics, domains = list(runs[0]["R"]), runs[0]["domains"]
    figure, axes = new_figure(len(metrics), len(runs), 1.6 + 0.75 * len(domains), 1.2 + 0.5 * len(domains))
    for row, metric in zip(axes, metrics, strict=True):
        values = [v for run in runs for line in run["R"][metric] for v in line if v is not None]
        colours = "viridis_r" if metric in LOWER_IS_BETTER else "viridis"
        for axis, run in zip(row, runs, strict=True):
            R = [[float("nan") if v is None else v for v in line] for line in run["R"][metric]]
            image = axis.imshow(R, cmap=colours, vmin=min(values), vmax=max(values), aspect="auto")
            for (i, j), value in np.ndenumerate(R):
                if np.isnan(value):
                    continue
                colour = "white" if image.cmap(image.norm(value))[1] < 0.6 else "black"
                learned = i == j + 1
                weight = "bold" if learned else "normal"
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, weight=weight)
                if learned:
                    axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="tab:red", linewidth=2))
            axis.set_xticks(range(len(domains)), domains)
            axis.set_yticks(range(len(domains) + 1), ["base", *(f"after {d}" for d in domains)])
            axis.set_xlabel("scored on")
            axis.set_title(f"{run['method']}\n{TITLES[metric]}", fontsize=9)
    figure.savefig(path, dpi=130)


def draw_curves(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Each domain's score through the stages, a column a domain (and the reference text), a row a metric."""
    metrics, domains = list(runs[0]["R"]), runs[0]["domains"]
    titles = list(domains) if runs[0]["R_reference"][0] is None else [*domains, "reference text"]
    figure, axes = new_figure(len(metrics), len(titles), 2.6, 2.5)
    stages = range(len(domains) + 1)
    for row, metric in zip(axes, metrics, strict=True):
        for column, (axis, title) in enumerate(zip(row, titles, strict=True)):
            is_reference = column == len(domains)
            series = {
                run["method"]: run["R_reference"] if is_reference else [line[column] for line in run["R"][metric]]
                for run in runs
            }
            if (is_reference and metric != "bits_per_byte") or any(values[0] is None for values in series.values()):
                axis.set_axis_off()
                continue
            for name, values in series.items():
                known = [float("nan") if value is None else value for value in values]
                axis.plot(stages, known, marker="o", markersize=3, label=name)
            if not is_reference:
                axis.axvline(column + 1, color="grey", linestyle=":", linewidth=1)
            axis.set_title(title, fontsize=9)
            axis.set_xticks(stages, ["base", *domains], rotation=40, fontsize=8)
            axis.set_ylim(bottom=0, top=None if metric in LOWER_IS_BETTER else 1.02)
        first = next((axis for axis in row if axis.axison), row[0])
        first.set_ylabel(TITLES[metric].replace(" (", "\n("), fontsize=8)
    figure.supxlabel("after training on (dotted line: the domain itself)", fontsize=9)
    handles, labels = next(found for axis in axes[0] if (found := axis.get_legend_handles_labels())[0])
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    figure.savefig(path, dpi=130)


def by_kind(names: Sequence[str]) -> dict[str, list[str]]:
    """Names of layers by kind: those that differ only in numbers (a block's, an expert's), in the given order.

    A kind is called by the shortest end of its dotted name, numbers left out, that no other kind has.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        kind = tuple(part for part in name.removesuffix(".weight").split(".") if not part.isdigit())
        groups.setdefault(kind, []).append(name)
    short = {}
    for kind, members in groups.items():
        length = 1
        while length < len(kind) and any(other != kind and other[-length:] == kind[-length:] for other in groups):
            length += 1
        short[".".join(kind[-length:])] = members
    return short


def capacity_bars(axis: Axes, domains: Sequence[str], used: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Stacked bars: layer → share in use after each domain, and what is free above. The place of each layer's bar."""
    from matplotlib import colormaps

    groups = by_kind(list(used))
    # A gap between kinds that is seen with 7 layers a kind and with 80.
    gap = max(0.4, 0.012 * sum(map(len, groups.values())))
    edge = 0.0
    ticks: dict[str, float] = {}
    places: dict[str, float] = {}
    for kind, names in groups.items():
        edges = [edge + i for i in range(len(names) + 1)]
        places |= {name: left + 0.5 for name, left in zip(names, edges, strict=False)}
        below = [0.0] * len(names)
        for number, domain in enumerate(domains):
            share = [used[name][number] for name in names]
            colour = colormaps["viridis"]((number + 0.5) / len(domains))
            label = f"used by {domain}" if edge == 0 else None
            axis.stairs(share, edges, baseline=below, fill=True, color=colour, label=label)
            below = share
        free = "free" if edge == 0 else None
        axis.stairs([1.0] * len(names), edges, baseline=below, fill=True, color="0.9", label=free)
        ticks[kind] = (edges[0] + edges[-1]) / 2
        edge = edges[-1] + gap
    axis.set_xticks(list(ticks.values()), list(ticks), rotation=0 if len(ticks) <= 8 else 40, fontsize=8)
    axis.tick_params(axis="x", length=0)
    axis.margins(x=0.01)
    axis.set_ylim(0, 1)
    return places


def draw_capacity(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Used share of each layer's input directions after each domain, stacked, and what is free above; a row a run."""
    figure, axes = new_figure(len(runs), 1, 10, 3)
    for (axis,), run in zip(axes, runs, strict=True):
        records = run["domain_records"]
        used = {
            name: [record["layers"][name]["used"] / record["layers"][name]["width"] for record in records]
            for name in records[-1]["layers"]
        }
        capacity_bars(axis, [record["domain"] for record in records], used)
        axis.set_ylabel("share of directions or neurons", fontsize=8)
        axis.set_title(run["method"], fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    figure.supxlabel("layers, by kind; within a kind from the first block (left) to the last", fontsize=9)
    figure.savefig(path, dpi=130)
