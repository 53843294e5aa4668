"""What a report shows of the neurons that domains share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparse_cl.report.section import Section, Table, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_USUAL = 0.05
_PANELS = 9
_NOTE = (
    "IoU = |A ∩ B| / |A ∪ B| of the K neurons of a layer with the largest mean |activation| over the answer tokens of "
    "each domain, without each sequence's first token and without massive activations (Sun et al. 2024: above 100 and "
    "above 1000 medians). Chance: K / (2d − K) for random K of d neurons, its 95% interval from the hypergeometric "
    "law (for the mean over layers simulated from these laws). Ceiling: the same for two random halves of one domain's "
    "sequences, mean of both domains; a half has half of the tokens, so that the whole domain again would agree more. "
    "Intervals: about 95%, groups of sequences resampled, corrected for the overlap that noise takes away. "
    "Neurons of equal mean are ranked at random."
)


def section(record: Mapping[str, Any]) -> Section:
    """From `Overlap.to_json()`."""
    at = min(range(len(record["fractions"])), key=lambda i: abs(record["fractions"][i] - _USUAL))
    return Section(
        "Overlap of active neurons",
        _sentence(record, at),
        (_heat(record, at), _sweep(record)),
        _table(record, at),
        _NOTE,
    )


def _sentence(record: Mapping[str, Any], at: int) -> str:
    pairs = [" and ".join(pair) for pair in record["pairs"]]
    found = [row[at] for row in record["mean_iou"]]
    ceilings = [row[at] for row in record["mean_ceiling"]]
    null, (low, high) = record["mean_null"][at], record["mean_null_interval"][at]
    above = sum(value > high for value in found)
    below = sum(value < low for value in found)
    text = (
        f"Of the {record['fractions'][at]:.0%} most active neurons domains share an IoU of {mean(found):.3f}, mean "
        f"over {'pairs and ' if len(pairs) > 1 else ''}layers: {mean(found) / null:.1f} times chance ({null:.3f}; 95% "
        f"of random sets within {low:.3f} to {high:.3f})"
    )
    if None not in ceilings:
        text += f" and {mean(found) / mean(ceilings):.0%} of what two halves of one domain share ({mean(ceilings):.2f})"
    text += ". "
    if len(pairs) > 1:
        least, most = found.index(min(found)), found.index(max(found))
        text += (
            f"The most is that of {pairs[most]}, {_value(record, most, at)}, the least that of {pairs[least]}, "
            f"{_value(record, least, at)}. "
        )
    text += _verdict(above, below, len(pairs), found, ceilings)
    massive = max(
        abs(a - b)
        for one, other in zip(record["mean_iou"], record["mean_massive_iou"], strict=True)
        for a, b in zip(one, other, strict=True)
    )
    if massive >= 0.005:
        text += f" With massive activations an IoU is up to {massive:.2f} different."
    return text


def _value(record: Mapping[str, Any], pair: int, at: int) -> str:
    (low, high), value = record["mean_interval"][pair][at], record["mean_iou"][pair][at]
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _verdict(above: int, below: int, pairs: int, found: Sequence[float], ceilings: Sequence[float | None]) -> str:
    reached = sum(c is not None and value >= c for value, c in zip(found, ceilings, strict=True))
    if reached == pairs:
        return "Domains share as much as one domain with itself: no neurons of their own can be told apart here."
    if above == pairs:
        text = "All of it is more than chance gives" if pairs > 1 else "That is more than chance gives"
        apart = "less than one domain shares with itself" if None not in ceilings else None
        both = f", and {apart}: domains use neurons in common and neurons of their own" if apart and not reached else ""
        return text + both + "."
    if above == 0 and below == 0:
        return "That is what chance gives: domains choose their neurons as if they knew nothing of each other."
    if above == 0:
        return f"No pair is above chance, and {below} of {pairs} below it: domains avoid each other's neurons."
    return f"Above chance {'is' if above == 1 else 'are'} {above} of {pairs} pairs, below it {below}."


def _heat(record: Mapping[str, Any], at: int) -> Figure:
    layers = len(record["layers"])
    figure, axes = new_figure(1, 2, height=max(2.6, min(8.0, 1.4 + 0.3 * layers)))
    iou = [[row[at][layer] for row in record["iou"]] for layer in range(layers)]
    null = record["null"][at]
    panels: list[tuple[list[list[float]], str, float, float | None]] = [
        (iou, f"IoU at K = {record['fractions'][at]:.0%} (chance {mean(null):.3f})", 0.0, None)
    ]
    if not any(value is None for row in record["ceiling"] for value in row[at]):
        relative = [
            [
                (iou[layer][pair] - null[layer]) / max(record["ceiling"][pair][at][layer] - null[layer], 1e-9)
                for pair in range(len(record["pairs"]))
            ]
            for layer in range(layers)
        ]
        panels.append((relative, "from chance (0) to ceiling (1)", 0.0, 1.0))
    names = ["–".join(pair) for pair in record["pairs"]]
    for axis, (values, title, low, high) in zip(axes[0], panels, strict=False):
        image = axis.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto", origin="lower")
        if layers * len(names) <= 160:
            for y, row in enumerate(values):
                for x, value in enumerate(row):
                    colour = "white" if image.norm(value) < 0.6 else "black"
                    axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        axis.set_ylabel("layer, the first below", fontsize=8)
        axis.tick_params(axis="y", labelsize=8)
        axis.set_title(title, fontsize=9)
        figure.colorbar(image, ax=axis, fraction=0.04).ax.tick_params(labelsize=8)
    for axis in axes[0][len(panels) :]:
        axis.set_axis_off()
    return figure


def _sweep(record: Mapping[str, Any]) -> Figure:
    order = sorted(range(len(record["pairs"])), key=lambda pair: -mean(record["mean_iou"][pair]))[:_PANELS]
    columns = min(3, len(order))
    figure, axes = new_figure(-(-len(order) // columns), columns, height=2.6, width=None if columns > 1 else 5.0)
    shares = record["fractions"]
    for axis, pair in zip(axes.flat, order, strict=False):
        axis.plot(shares, record["mean_iou"][pair], marker="o", markersize=3, label="IoU")
        intervals = record["mean_interval"][pair]
        if all(low is not None for low, _ in intervals):
            axis.fill_between(shares, *zip(*intervals, strict=True), alpha=0.3, label="its 95% interval")
        axis.plot(shares, record["mean_null"], "--", color="tab:red", label="chance")
        axis.fill_between(
            shares,
            *zip(*record["mean_null_interval"], strict=True),
            color="tab:red",
            alpha=0.2,
            label="95% of random sets",
        )
        if all(value is not None for value in record["mean_ceiling"][pair]):
            axis.plot(shares, record["mean_ceiling"][pair], ":", color="black", label="ceiling")
        axis.set_xscale("log")
        axis.set_xticks(shares, [f"{share:.3g}" for share in shares], fontsize=8)
        axis.minorticks_off()
        axis.tick_params(axis="y", labelsize=8)
        axis.set_ylim(0, 1.02)
        axis.set_title(" and ".join(record["pairs"][pair]), fontsize=9)
    for axis in list(axes.flat)[len(order) :]:
        axis.set_axis_off()
    figure.supxlabel("K, share of the neurons", fontsize=8)
    figure.supylabel("IoU, mean over layers", fontsize=8)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    return figure


def _table(record: Mapping[str, Any], at: int) -> Table:
    chosen = sorted({at, min(at + 1, len(record["fractions"]) - 1)})
    header = ["pair"]
    for f in chosen:
        header += [f"IoU at {record['fractions'][f]:.0%}", "with massive", "chance", "ceiling"]
    rows = []
    for pair, names in enumerate(record["pairs"]):
        row = [" and ".join(names)]
        for f in chosen:
            low, high = record["mean_null_interval"][f]
            ceiling = record["mean_ceiling"][pair][f]
            row += [
                _value(record, pair, f),
                f"{record['mean_massive_iou'][pair][f]:.3f}",
                f"{record['mean_null'][f]:.3f} [{low:.3f}, {high:.3f}]",
                "–" if ceiling is None else f"{ceiling:.3f}",
            ]
        rows.append(tuple(row))
    return Table(tuple(header), tuple(rows))
