"""What a report shows of the neurons that domains share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparse_cl.report.section import Section, Table, decimal, nearest, within

from .drawing import label, legend_above, new_figure, new_grid

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
    at = nearest(record["fractions"], _USUAL)
    figures = (_heat(record, at), _sweep(record))
    return Section("Overlap of active neurons", _sentence(record, at), figures, _table(record, at), _NOTE)


def _sentence(record: Mapping[str, Any], at: int) -> str:
    pairs = [" and ".join(pair) for pair in record["pairs"]]
    found, ceilings = ([row[at] for row in record[key]] for key in ("mean_iou", "mean_ceiling"))
    null, (low, high) = record["mean_null"][at], record["mean_null_interval"][at]
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
    above, below = sum(value > high for value in found), sum(value < low for value in found)
    text += _verdict(above, below, len(pairs), found, ceilings)
    both = zip(sum(record["mean_iou"], []), sum(record["mean_massive_iou"], []), strict=True)
    if (massive := max(abs(without - given) for without, given in both)) >= 0.005:
        text += f" With massive activations an IoU is up to {massive:.2f} different."
    return text


def _value(record: Mapping[str, Any], pair: int, at: int) -> str:
    return f"{record['mean_iou'][pair][at]:.3f}{within(record['mean_interval'][pair][at])}"


def _verdict(above: int, below: int, pairs: int, found: Sequence[float], ceilings: Sequence[float | None]) -> str:
    reached = sum(c is not None and value >= c for value, c in zip(found, ceilings, strict=True))
    if reached == pairs:
        return "Domains share as much as one domain with itself: no neurons of their own can be told apart here."
    if above == pairs:
        text = "All of it is more than chance gives" if pairs > 1 else "That is more than chance gives"
        if None in ceilings or reached:
            return text + "."
        return (
            f"{text}, and less than one domain shares with itself: domains use neurons in common and neurons of their "
            "own."
        )
    if above == 0 and below == 0:
        return "That is what chance gives: domains choose their neurons as if they knew nothing of each other."
    if above == 0:
        return f"No pair is above chance, and {below} of {pairs} below it: domains avoid each other's neurons."
    return f"Above chance {'is' if above == 1 else 'are'} {above} of {pairs} pairs, below it {below}."


def _heat(record: Mapping[str, Any], at: int) -> Figure:
    layers, names = len(record["layers"]), ["–".join(pair) for pair in record["pairs"]]
    figure, axes = new_figure(1, 2, max(2.6, min(8.0, 1.4 + 0.3 * layers)))
    null, iou, ceiling = record["null"][at], [row[at] for row in record["iou"]], [row[at] for row in record["ceiling"]]
    panels: list[tuple[str, list[list[float]], float | None]] = [
        (f"IoU at K = {record['fractions'][at]:.0%} (chance {mean(null):.3f})", iou, None)
    ]
    if not any(None in row for row in ceiling):
        relative = [
            [(value - low) / max(high - low, 1e-9) for value, low, high in zip(*rows, strict=True)]
            for rows in ((iou[pair], null, ceiling[pair]) for pair in range(len(names)))
        ]
        panels.append(("from chance (0) to ceiling (1)", relative, 1.0))
    for axis, (title, by_pair, most) in zip(axes[0], panels, strict=False):
        values = list(zip(*by_pair, strict=True))
        image = axis.imshow(values, cmap="viridis", vmin=0.0, vmax=most, aspect="auto", origin="lower")
        if layers * len(names) <= 160:
            for y, row in enumerate(values):
                for x, value in enumerate(row):
                    colour = "white" if image.norm(value) < 0.6 else "black"
                    axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
        label(axis, y="layer, the first below", title=title)
        figure.colorbar(image, ax=axis, fraction=0.04).ax.tick_params(labelsize=8)
    for axis in axes[0][len(panels) :]:
        axis.set_axis_off()
    return figure


def _sweep(record: Mapping[str, Any]) -> Figure:
    order = sorted(range(len(record["pairs"])), key=lambda pair: -mean(record["mean_iou"][pair]))[:_PANELS]
    figure, axes = new_grid(len(order))
    shares = record["fractions"]
    for axis, pair in zip(axes, order, strict=True):
        axis.plot(shares, record["mean_iou"][pair], marker="o", markersize=3, label="IoU")
        intervals, ceilings = record["mean_interval"][pair], record["mean_ceiling"][pair]
        if not any(None in interval for interval in intervals):
            lows, highs = zip(*intervals, strict=True)
            axis.fill_between(shares, lows, highs, alpha=0.3, label="its 95% interval")
        axis.plot(shares, record["mean_null"], "--", color="tab:red", label="chance")
        lows, highs = zip(*record["mean_null_interval"], strict=True)
        axis.fill_between(shares, lows, highs, color="tab:red", alpha=0.2, label="95% of random sets")
        if None not in ceilings:
            axis.plot(shares, ceilings, ":", color="black", label="ceiling")
        axis.set_xscale("log")
        axis.set_xticks(shares, [f"{share:.3g}" for share in shares])
        axis.minorticks_off()
        axis.set_ylim(0, 1.02)
        label(axis, title=" and ".join(record["pairs"][pair]))
    figure.supxlabel("K, share of the neurons", fontsize=8)
    figure.supylabel("IoU, mean over layers", fontsize=8)
    legend_above(figure, axes[0])
    return figure


def _table(record: Mapping[str, Any], at: int) -> Table:
    pairs = range(len(record["pairs"]))
    columns = [("pair", [" and ".join(names) for names in record["pairs"]])]
    for f in sorted({at, min(at + 1, len(record["fractions"]) - 1)}):
        chance = f"{record['mean_null'][f]:.3f}{within(record['mean_null_interval'][f])}"
        columns += [
            (f"IoU at {record['fractions'][f]:.0%}", [_value(record, pair, f) for pair in pairs]),
            ("with massive", [f"{record['mean_massive_iou'][pair][f]:.3f}" for pair in pairs]),
            ("chance", [chance for _ in pairs]),
            ("ceiling", [decimal(record["mean_ceiling"][pair][f]) for pair in pairs]),
        ]
    return Table.of_columns(columns)
