"""What a report shows of capacity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from sparse_cl.four_domains.figures import capacity_bars
from sparse_cl.report.section import Section, Table, new_figure

from .drawing import label, legend_above

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NOTE = (
    "A domain uses the fewest directions of a layer's input that, with those in use, explain {energy:.0%} of its "
    "inputs' energy (GPM's criterion), on the model as it is. Random: the same spectra, each domain's turned at "
    "random. Repeated: what the second half of a domain's sequences adds to the first half's directions; a domain that "
    "adds no more than that is not told apart from a repetition. Surviving (B): the share of the energy of a domain's "
    "mean gradient outside what earlier domains use. Left (C·B): the free share times that of the last domain. More "
    "fit: the free directions over what the last domain added; in brackets over the most and the least that one added."
)
Shares = Mapping[str, Sequence[float]]
"""Layer -> its share in use after each domain."""


def section(record: Mapping[str, Any]) -> Section:
    """From `Capacity.to_json()`."""
    domains, layers = record["domains"], record["layers"]
    used = {name: [count / layer["width"] for count in layer["used"]] for name, layer in layers.items()}
    null = {name: layer["used_null"][-1] / layer["width"] for name, layer in layers.items()}
    neurons = {name: [n / layer["neurons"] for n in layer["used"]] for name, layer in record["neurons"].items()}
    return Section(
        "Capacity",
        _sentence(record, used, null, neurons),
        (_figure(domains, used, null, neurons),),
        _table(domains, layers),
        _NOTE.format(energy=record["energy"]),
    )


def _sentence(record: Mapping[str, Any], used: Shares, null: Mapping[str, float], neurons: Shares) -> str:
    domains, layers, several = record["domains"], record["layers"], len(record["domains"]) > 1
    first, after = (mean(shares[at] for shares in used.values()) for at in (0, -1))
    random = mean(null.values())
    against = f"; {random:.0%} if the domains' directions were random to each other" if several else ""
    parts = [
        f"After {len(domains)} domain{'s' if several else ''} {after:.0%} of the input directions are in use, mean "
        f"over layers ({first:.0%} after {domains[0]} alone{against})"
    ]
    if several and random > first:
        ratio = (after - first) / (random - first)
        parts.append(
            f"later domains add {ratio:.0%} of what unrelated ones would: they share directions, so protecting the "
            "first protects much that the others need"
            if ratio < 0.9
            else "later domains add as much as unrelated ones would: they share almost no directions"
        )
    if several:
        parts.append(_fits(record["forecast"]))
    surviving = [layer["surviving"][-1] for layer in layers.values() if layer["surviving"] is not None]
    if several and surviving:
        parts.append(
            f"of the gradient of {domains[-1]}, {median(surviving):.0%} survives the protection of the others in the "
            f"median layer, {min(surviving):.1%} in the worst"
        )
    if neurons:
        carrying = mean(shares[-1] for shares in neurons.values())
        parts.append(f"of the neurons, {carrying:.0%} carry most of the activation of some domain")
    return "; ".join(parts) + "."


def _fits(forecast: Mapping[str, float | None]) -> str:
    if forecast["expected"] is None:
        return "the last domain added nothing in most layers, so no end is in sight"
    text = f"at the last domain's demand {forecast['expected']:.0f} more fit in the median layer"
    full = forecast["first"]
    return text if full is None else f"{text} and {full:.0f} in the one that is full first"


def _figure(domains: Sequence[str], used: Shares, null: Mapping[str, float], neurons: Shares) -> Figure:
    figure, axes = new_figure(2 if neurons else 1, 1, height=2.8)
    axis = axes[0][0]
    places = capacity_bars(axis, domains, used)
    if len(domains) > 1:
        random = [null[name] for name in places]
        axis.plot(list(places.values()), random, "_", color="tab:red", label="random to each other")
    label(axis, y="share of input directions")
    if neurons:
        capacity_bars(axes[1][0], domains, neurons)
        label(axes[1][0], y="share of neurons")
    legend_above(figure, axis)
    figure.supxlabel("layers, by kind; within a kind from the first block (left) to the last", fontsize=9)
    return figure


def _table(domains: Sequence[str], layers: Mapping[str, Mapping[str, Any]]) -> Table:
    found = list(layers.values())
    columns = [("layer's input", list(layers)), ("width", [str(layer["width"]) for layer in found])]
    for i, domain in enumerate(domains):
        halves = [sorted(layer["alone_halves"][i]) for layer in found]
        cells = [str(low) if low == high else f"{low}–{high}" for low, high in halves]
        columns.append((f"{domain} alone (each half)", cells))
    for i, domain in enumerate(domains):
        columns.append((f"in use after {domain}", [str(layer["used"][i]) for layer in found]))
    forecasts = [{key: _number(value) for key, value in layer["forecast"].items()} for layer in found]
    columns += [
        ("random", [str(layer["used_null"][-1]) for layer in found]),
        ("repeated", [f"{mean(layer['repeated']):.0f}" for layer in found]),
        ("surviving", ["–" if layer["surviving"] is None else f"{layer['surviving'][-1]:.2f}" for layer in found]),
        ("left", ["–" if layer["left"] is None else f"{layer['left']:.2f}" for layer in found]),
        ("more fit", ["{expected} ({low}–{high})".format(**forecast) for forecast in forecasts]),
    ]
    return Table.of_columns(columns)


def _number(value: float | None) -> str:
    return "∞" if value is None else f"{value:.0f}"
