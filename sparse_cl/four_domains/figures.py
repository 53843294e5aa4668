"""Pictures of a run: R of each method, and each domain's score through the stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .metrics import LOWER_IS_BETTER

TITLES = {
    "bits_per_byte": "bits per byte of the response (lower is better)",
    "accuracy": "accuracy by likelihood (higher is better)",
    "exact_match": "exact match of the answer (higher is better)",
}


def _new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    # The object interface: no global state, and no display needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_matrices(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """R as a heat map, a column a method, a row a metric. Boxed: the domain that was just learned."""
    metrics = list(runs[0]["R"])
    domains = runs[0]["domains"]
    figure, axes = _new_figure(len(metrics), len(runs), 1.6 + 0.75 * len(domains), 1.2 + 0.5 * len(domains))
    for row, metric in enumerate(metrics):
        values = [v for run in runs for line in run["R"][metric] for v in line if v is not None]
        for column, run in enumerate(runs):
            axis = axes[row][column]
            R = [[float("nan") if v is None else v for v in line] for line in run["R"][metric]]
            colours = "viridis_r" if metric in LOWER_IS_BETTER else "viridis"
            image = axis.imshow(R, cmap=colours, vmin=min(values), vmax=max(values), aspect="auto")
            for i, line in enumerate(R):
                for j, value in enumerate(line):
                    if value != value:
                        continue
                    dark = image.cmap(image.norm(value))[1] < 0.6
                    weight = "bold" if i == j + 1 else "normal"
                    colour = "white" if dark else "black"
                    axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, weight=weight)
                    if i == j + 1:
                        axis.add_patch(_box(j, i))
            axis.set_xticks(range(len(domains)), domains)
            axis.set_yticks(range(len(domains) + 1), ["base", *(f"after {d}" for d in domains)])
            axis.set_xlabel("scored on")
            axis.set_title(f"{run['method']}\n{TITLES[metric]}", fontsize=9)
    figure.savefig(path, dpi=130)


def _box(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="tab:red", linewidth=2)


def draw_curves(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Each domain's score through the stages, a column a domain (and the reference text), a row a metric."""
    metrics = list(runs[0]["R"])
    domains = runs[0]["domains"]
    has_reference = runs[0]["R_reference"][0] is not None
    figure, axes = _new_figure(len(metrics), len(domains) + has_reference, 2.6, 2.5)
    stages = range(len(domains) + 1)
    for row, metric in enumerate(metrics):
        for column, domain in enumerate([*domains, *(["reference text"] if has_reference else [])]):
            axis = axes[row][column]
            is_reference = column == len(domains)
            if is_reference and metric != "bits_per_byte":
                axis.set_axis_off()
                continue
            series = {
                run["method"]: run["R_reference"] if is_reference else [line[column] for line in run["R"][metric]]
                for run in runs
            }
            if any(None in values for values in series.values()):
                axis.set_axis_off()
                continue
            for name, values in series.items():
                axis.plot(stages, values, marker="o", markersize=3, label=name)
            if not is_reference:
                axis.axvline(column + 1, color="grey", linestyle=":", linewidth=1)
            axis.set_title(domain, fontsize=9)
            axis.set_xticks(stages, ["base", *domains], rotation=40, fontsize=8)
            axis.set_ylim(bottom=0, top=None if metric in LOWER_IS_BETTER else 1.02)
        first = next((axis for axis in axes[row] if axis.axison), axes[row][0])
        first.set_ylabel(TITLES[metric].replace(" (", "\n("), fontsize=8)
        figure.supxlabel("after training on (dotted line: the domain itself)", fontsize=9)
    handles, labels = next(a.get_legend_handles_labels() for a in axes[0] if a.get_legend_handles_labels()[0])
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    figure.savefig(path, dpi=130)
