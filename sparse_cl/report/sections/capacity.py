"""What the report shows of capacity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

from sparse_cl.four_domains.figures import capacity_bars
from sparse_cl.report.section import Section, Table, new_figure


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
        "A domain uses the fewest directions of a layer's input that, with those in use, explain "
        f"{record['energy']:.0%} of its inputs' energy (GPM's criterion), on the model as it is. Random: the same "
        "spectra, each domain's turned at random. Repeated: what the second half of a domain's sequences adds to the "
        "first half's directions; a domain that adds no more than that is not told apart from a repetition. Surviving "
        "(B): the share of the energy of a domain's mean gradient outside what earlier domains use. Left (C·B): the "
        "free share times that of the last domain. More fit: the free directions over what the last domain added; in "
        "brackets over the most and the least that one added.",
    )


def _sentence(
    record: Mapping[str, Any],
    used: Mapping[str, Sequence[float]],
    null: Mapping[str, float],
    neurons: Mapping[str, Sequence[float]],
) -> str:
    domains, layers, forecast = record["domains"], record["layers"], record["forecast"]
    after = mean(shares[-1] for shares in used.values())
    random = mean(null.values())
    first = mean(shares[0] for shares in used.values())
    parts = [
        f"After {_count(len(domains), 'domain')} {after:.0%} of the input directions are in use, mean over layers "
        f"({first:.0%} after {domains[0]} alone"
        + (f"; {random:.0%} if the domains' directions were random to each other)" if len(domains) > 1 else ")")
    ]
    if len(domains) > 1:
        ratio = (after - first) / (random - first) if random > first else None
        if ratio is not None and ratio < 0.9:
            parts.append(
                f"later domains add {ratio:.0%} of what unrelated ones would: they share directions, so protecting the "
                "first protects much that the others need"
            )
        elif ratio is not None:
            parts.append("later domains add as much as unrelated ones would: they share almost no directions")
        parts.append(_fits(forecast))
    surviving = [layer["surviving"][-1] for layer in layers.values() if layer["surviving"] is not None]
    if len(domains) > 1 and surviving:
        parts.append(
            f"of the gradient of {domains[-1]}, {median(surviving):.0%} survives the protection of the others in the "
            f"median layer, {min(surviving):.1%} in the worst"
        )
    if neurons:
        parts.append(
            f"of the neurons, {mean(s[-1] for s in neurons.values()):.0%} carry most of the activation of some domain"
        )
    return "; ".join(parts) + "."


def _fits(forecast: Mapping[str, float | None]) -> str:
    if forecast["expected"] is None:
        return "the last domain added nothing in most layers, so no end is in sight"
    text = f"at the last domain's demand {forecast['expected']:.0f} more fit in the median layer"
    return text + (
        f" and {forecast['first']:.0f} in the one that is full first" if forecast["first"] is not None else ""
    )


def _figure(
    domains: Sequence[str],
    used: Mapping[str, Sequence[float]],
    null: Mapping[str, float],
    neurons: Mapping[str, Sequence[float]],
) -> Any:
    figure, axes = new_figure(2 if neurons else 1, 1, height=2.8)
    axis = axes[0][0]
    places = capacity_bars(axis, domains, used)
    if len(domains) > 1:
        axis.plot(
            list(places.values()),
            [null[name] for name in places],
            linestyle="none",
            marker="_",
            color="tab:red",
            label="random to each other",
        )
    axis.set_ylabel("share of input directions", fontsize=8)
    if neurons:
        capacity_bars(axes[1][0], domains, neurons)
        axes[1][0].set_ylabel("share of neurons", fontsize=8)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    figure.supxlabel("layers, by kind; within a kind from the first block (left) to the last", fontsize=9)
    return figure


def _table(domains: Sequence[str], layers: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for name, layer in layers.items():
        forecast = layer["forecast"]
        rows.append(
            (
                name,
                str(layer["width"]),
                *(f"{low}–{high}" if low != high else str(low) for low, high in map(sorted, layer["alone_halves"])),
                *map(str, layer["used"]),
                str(layer["used_null"][-1]),
                f"{mean(layer['repeated']):.0f}",
                "–" if layer["surviving"] is None else f"{layer['surviving'][-1]:.2f}",
                "–" if layer["left"] is None else f"{layer['left']:.2f}",
                f"{_number(forecast['expected'])} ({_number(forecast['low'])}–{_number(forecast['high'])})",
            )
        )
    header = (
        "layer's input",
        "width",
        *(f"{domain} alone (each half)" for domain in domains),
        *(f"in use after {domain}" for domain in domains),
        "random",
        "repeated",
        "surviving",
        "left",
        "more fit",
    )
    return Table(header, tuple(rows))


def _number(value: float | None) -> str:
    return "∞" if value is None else f"{value:.0f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
