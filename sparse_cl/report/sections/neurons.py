"""What a report shows of hub and dormant neurons."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparse_cl.report.section import Section, Table, new_figure

from .layer_axis import label_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NOTE = (
    "Hubs by usage: among the K most active neurons (mean |activation|) of every domain; chance is d (K/d)^domains, "
    "its 95% interval exact for random sets; there can be no more than K. Hubs by weight: the K largest products of "
    "the norms of the weights into and out of a neuron. Their agreement is the IoU with the K most used neurons, those "
    "whose lowest percentile over domains is highest; chance K / (2d − K), ceiling 1. Dormant: E|h_i| / mean_j E|h_j| "
    "≤ τ (Sokar et al. 2023); neurons that are alike have scores near 1, so chance leaves none. Intervals: 95%, "
    "sequences resampled."
)


def section(
    dormant: Mapping[str, Any], hubs: Mapping[str, Any] | None = None, weights: Mapping[str, Any] | None = None
) -> Section:
    """From `Dormant.to_json()`; with two domains or more `Hubs.to_json()` and what `neurons.agreement` returns."""
    sentences, figures = [], []
    if hubs:
        sentences.append(_hub_sentence(hubs))
        figures.append(_hub_figure(hubs, weights))
    if weights:
        sentences.append(_weight_sentence(weights))
    sentences.append(_dormant_sentence(dormant))
    if any(any(one["counts"]) for entry in dormant["dormant"] for one in entry["domains"].values()):
        figures.append(_dormant_figure(dormant))
    return Section(
        "Hub and dormant neurons", " ".join(sentences), tuple(figures), _table(dormant, hubs, weights), _NOTE
    )


def _hub_sentence(hubs: Mapping[str, Any]) -> str:
    layers = hubs["layers"]
    found, width = sum(len(layer["hubs"]) for layer in layers), sum(layer["neurons"] for layer in layers)
    expected = sum(layer["expected"] for layer in layers)
    above = sum(len(layer["hubs"]) > layer["null_interval"][1] for layer in layers)
    text = (
        f"{found} of {width:,} neurons ({found / width:.2%}) are hubs, among the top {hubs['share']:.0%} in all "
        f"{len(hubs['domains'])} domains, where choices at random would have {expected:.3g} in common and identical "
        f"ones {sum(layer['k'] for layer in layers)}"
    )
    if above == len(layers):
        return text + ": more than chance in every layer."
    return text + (f": more than chance in {above} of {len(layers)} layers." if above else ": no more than chance.")


def _weight_sentence(weights: Mapping[str, Any]) -> str:
    iou, null = (mean(layer[key] for layer in weights.values()) for key in ("iou", "null"))
    above = sum(layer["iou"] > layer["null_interval"][1] for layer in weights.values())
    text = (
        f"The most used neurons are those with the largest weights to an IoU of {iou:.3f} (chance {null:.3f}, "
        "ceiling 1), "
    )
    if not above:
        return text + "no more than chance in any layer."
    return text + f"more than chance in {above} of {len(weights)} layers."


def _dormant_sentence(dormant: Mapping[str, Any]) -> str:
    widest = max(dormant["dormant"], key=lambda entry: entry["tau"])
    tau, everywhere = widest["tau"], sum(widest["all domains"]["counts"])
    somewhere = {name: sum(one["counts"]) for name, one in widest["domains"].items()}
    if not any(somewhere.values()):
        return f"No neuron is dormant in any domain, even at τ = {tau:g}."
    width = sum(dormant["neurons"])
    most = max(somewhere, key=somewhere.__getitem__)
    text = f"At τ = {tau:g} {everywhere} of {width:,} neurons ({everywhere / width:.2%}) are dormant"
    if len(somewhere) == 1:
        return text + "."
    return text + f" in every domain; most in {most}, {somewhere[most]} ({somewhere[most] / width:.2%})."


def _hub_figure(hubs: Mapping[str, Any], weights: Mapping[str, Any] | None) -> Figure:
    figure, axes = new_figure(1, 2 if weights else 1, height=3.0, width=None if weights else 5.0)
    layers, axis = hubs["layers"], axes[0][0]
    places = range(len(layers))
    counts = [len(layer["hubs"]) for layer in layers]
    axis.bar(places, counts, color="tab:blue", label="hubs")
    if all(layer["interval"] for layer in layers):
        lows = [max(0.0, count - layer["interval"][0]) for count, layer in zip(counts, layers, strict=True)]
        highs = [max(0.0, layer["interval"][1] - count) for count, layer in zip(counts, layers, strict=True)]
        axis.errorbar(
            places, counts, yerr=[lows, highs], linestyle="none", color="black", capsize=3, label="95% interval"
        )
    edges = [i - 0.5 for i in range(len(layers) + 1)]
    axis.stairs(
        [layer["null_interval"][1] for layer in layers],
        edges,
        baseline=[layer["null_interval"][0] for layer in layers],
        color="tab:red",
        label="95% of random choices",
    )
    axis.set_ylabel(f"hubs, of at most {max(layer['k'] for layer in layers)}", fontsize=8)
    axis.legend(fontsize=8)
    label_layers(axis, [layer["name"] for layer in layers])
    if weights:
        axis = axes[0][1]
        axis.bar(range(len(weights)), [layer["iou"] for layer in weights.values()], color="tab:green", label="IoU")
        lows, highs = map(list, zip(*(layer["null_interval"] for layer in weights.values()), strict=True))
        edges = [i - 0.5 for i in range(len(weights) + 1)]
        axis.stairs(highs, edges, baseline=lows, color="tab:red", label="95% of random sets")
        axis.set_ylabel("IoU of the most used and\nthe largest weights", fontsize=8)
        axis.legend(fontsize=8)
        label_layers(axis, list(weights))
    return figure


def _dormant_figure(dormant: Mapping[str, Any]) -> Figure:
    entries = dormant["dormant"]
    figure, axes = new_figure(1, len(entries), height=2.6, width=None if len(entries) > 1 else 5.0)
    layers = range(len(dormant["layers"]))
    for axis, entry in zip(axes[0], entries, strict=True):
        series = {name: one["counts"] for name, one in entry["domains"].items()}
        if len(series) > 1:
            series["all domains"] = entry["all domains"]["counts"]
        width = 0.8 / len(series)
        for number, (name, counts) in enumerate(series.items()):
            shares = [count / neurons for count, neurons in zip(counts, dormant["neurons"], strict=True)]
            colour = "black" if name == "all domains" else None
            axis.bar(
                [place - 0.4 + width * (number + 0.5) for place in layers], shares, width, label=name, color=colour
            )
        axis.set_title(f"τ = {entry['tau']:g}", fontsize=9)
        if not any(map(any, series.values())):
            axis.text(0.5, 0.5, "none", transform=axis.transAxes, ha="center", color="grey")
            axis.set_yticks([])
        label_layers(axis, dormant["layers"])
    axes[0][0].set_ylabel("share of dormant neurons", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    return figure


def _table(dormant: Mapping[str, Any], hubs: Mapping[str, Any] | None, weights: Mapping[str, Any] | None) -> Table:
    header = ["layer", "neurons"]
    if hubs:
        header += ["hubs", "at random", "95% of random"]
    if weights:
        header += ["IoU with the largest weights", "chance", "rank correlation"]
    header += [f"dormant in all, τ = {entry['tau']:g}" for entry in dormant["dormant"]]
    rows = []
    for number, (name, neurons) in enumerate(zip(dormant["layers"], dormant["neurons"], strict=True)):
        row = [name, f"{neurons:,}"]
        if hubs:
            layer = hubs["layers"][number]
            interval = layer["interval"] and " [{:.0f}, {:.0f}]".format(*layer["interval"])
            low, high = layer["null_interval"]
            row += [f"{len(layer['hubs'])}{interval or ''}", f"{layer['expected']:.3g}", f"{low} to {high}"]
        if weights:
            layer = weights[name]
            correlation = layer["correlation"]
            row += [f"{layer['iou']:.3f}", f"{layer['null']:.3f}", "–" if correlation is None else f"{correlation:.2f}"]
        row += [str(entry["all domains"]["counts"][number]) for entry in dormant["dormant"]]
        rows.append(tuple(row))
    return Table(tuple(header), tuple(rows))
