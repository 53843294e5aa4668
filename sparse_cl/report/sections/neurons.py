"""What a report shows of hub and dormant neurons."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparse_cl.report.section import Section, Table, within

from .drawing import bands, bars, beside, label, label_layers, legend_above, new_figure

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
    table = _table(dormant, hubs, weights)
    return Section("Hub and dormant neurons", " ".join(sentences), tuple(figures), table, _NOTE)


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
    more = f"more than chance in {above} of {len(weights)} layers" if above else "no more than chance in any layer"
    return (
        f"The most used neurons are those with the largest weights to an IoU of {iou:.3f} (chance {null:.3f}, "
        f"ceiling 1), {more}."
    )


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
    figure, axes = new_figure(1, 2 if weights else 1)
    layers, axis = hubs["layers"], axes[0][0]
    counts = [len(layer["hubs"]) for layer in layers]
    axis.bar(range(len(layers)), counts, color="tab:blue", label="hubs")
    if lengths := bars(counts, [layer["interval"] for layer in layers]):
        look: dict[str, Any] = {"linestyle": "none", "color": "black", "capsize": 3}
        axis.errorbar(range(len(layers)), counts, yerr=lengths, label="95% interval", **look)
    bands(axis, [layer["null_interval"] for layer in layers], color="tab:red", label="95% of random choices")
    label(axis, y=f"hubs, of at most {max(layer['k'] for layer in layers)}")
    axis.legend(fontsize=8)
    label_layers(axis, [layer["name"] for layer in layers])
    if weights:
        axis = axes[0][1]
        axis.bar(range(len(weights)), [layer["iou"] for layer in weights.values()], color="tab:green", label="IoU")
        nulls = [layer["null_interval"] for layer in weights.values()]
        bands(axis, nulls, color="tab:red", label="95% of random sets")
        label(axis, y="IoU of the most used and\nthe largest weights")
        axis.legend(fontsize=8)
        label_layers(axis, list(weights))
    return figure


def _dormant_figure(dormant: Mapping[str, Any]) -> Figure:
    entries = dormant["dormant"]
    figure, axes = new_figure(1, len(entries), 2.6)
    for axis, entry in zip(axes[0], entries, strict=True):
        series = {name: one["counts"] for name, one in entry["domains"].items()}
        if len(series) > 1:
            series["all domains"] = entry["all domains"]["counts"]
        width = 0.8 / len(series)
        for number, (name, counts) in enumerate(series.items()):
            shares = [count / neurons for count, neurons in zip(counts, dormant["neurons"], strict=True)]
            places = beside(number, len(series), len(shares), width)
            axis.bar(places, shares, width, label=name, color="black" if name == "all domains" else None)
        label(axis, title=f"τ = {entry['tau']:g}")
        if not any(map(any, series.values())):
            axis.text(0.5, 0.5, "none", transform=axis.transAxes, ha="center", color="grey")
            axis.set_yticks([])
        label_layers(axis, dormant["layers"])
    label(axes[0][0], y="share of dormant neurons")
    legend_above(figure, axes[0][0])
    return figure


def _table(dormant: Mapping[str, Any], hubs: Mapping[str, Any] | None, weights: Mapping[str, Any] | None) -> Table:
    columns = [("layer", dormant["layers"]), ("neurons", [f"{neurons:,}" for neurons in dormant["neurons"]])]
    if hubs:
        layers = hubs["layers"]
        columns += [
            ("hubs", [f"{len(layer['hubs'])}{within(layer['interval'], '.0f')}" for layer in layers]),
            ("at random", [f"{layer['expected']:.3g}" for layer in layers]),
            ("95% of random", ["{} to {}".format(*layer["null_interval"]) for layer in layers]),
        ]
    if weights:
        layers = [weights[name] for name in dormant["layers"]]
        correlations = [layer["correlation"] for layer in layers]
        columns += [
            ("IoU with the largest weights", [f"{layer['iou']:.3f}" for layer in layers]),
            ("chance", [f"{layer['null']:.3f}" for layer in layers]),
            ("rank correlation", ["–" if value is None else f"{value:.2f}" for value in correlations]),
        ]
    for entry in dormant["dormant"]:
        columns.append((f"dormant in all, τ = {entry['tau']:g}", list(map(str, entry["all domains"]["counts"]))))
    return Table.of_columns(columns)
