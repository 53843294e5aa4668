"""What a report shows of how an update spreads over the neurons."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparse_cl.four_domains.figures import PAGE_WIDTH, by_kind
from sparse_cl.report.section import Section, Table, decimal, mean_of_known, span

from .drawing import bars, label, label_layers, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EVEN = 0.9
_CONCENTRATED = 0.45
"""Half of what an even update needs: below it an update is called concentrated."""

_NOTE = (
    "Energy: ‖ΔW‖², squared entries of the change of the weights, summed over what belongs to a neuron: its rows in "
    "the layers into the neurons, its column in the layer out of them. Share of the neurons: the fewest that hold 90 % "
    "of an MLP's energy; 90 % if all neurons change alike (the null), 1 neuron at least. Hubs: neurons that every "
    "domain uses; if the update did not prefer them they would get their share of the neurons, and as many neurons "
    "drawn at random get a share within the interval in about 95 % of draws. Computed from all weights, so there is no "
    "interval."
)


def section(record: Mapping[str, Any]) -> Section:
    """From `Smearing.to_json()`."""
    sentence = _of_spread(record["mlps"])
    if any(hub["hubs"] for hub in record["hubs"].values()):
        sentence += " " + _of_hubs([hub for hub in record["hubs"].values() if hub["hubs"]])
    return Section("Smearing", sentence, (_figure(record),), _table(record), _NOTE)


def _of_spread(mlps: Mapping[str, Mapping[str, Any]]) -> str:
    shares = {name: spread["share90"] for name, spread in mlps.items() if spread["share90"] is not None}
    if not shares:
        return f"None of the {len(mlps)} MLPs changed."
    least, most = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    average = mean(shares.values())
    still = f"; {len(mlps) - len(shares)} of {len(mlps)} MLPs did not change" if len(shares) < len(mlps) else ""
    return (
        f"90 % of the update's energy lies in {average:.1%} of an MLP's neurons on average ({shares[least]:.1%} in "
        f"{least} to {shares[most]:.1%} in {most}; 90 % if it were spread evenly){still}: it is "
        f"{'concentrated on few' if average < _CONCENTRATED else 'smeared over most'} of the neurons."
    )


def _of_hubs(hubs: list[Mapping[str, Any]]) -> str:
    changed = [hub for hub in hubs if hub["share_of_energy"] is not None]
    if not changed:
        return "No MLP with hubs changed."
    above = sum(hub["share_of_energy"] > hub["null_interval"][1] for hub in changed)
    below = sum(hub["share_of_energy"] < hub["null_interval"][0] for hub in changed)
    share, null = (mean(hub[key] for hub in changed) for key in ("share_of_energy", "share_of_neurons"))
    return (
        f"The hubs, {null:.1%} of the neurons, get {share:.1%} of the energy ({share / null:.2f} times their share): "
        f"more than chance in {above} of {len(changed)} MLPs, less in {below}, within it in "
        f"{len(changed) - above - below}."
    )


def _figure(record: Mapping[str, Any]) -> Figure:
    hubs = {name: hub for name, hub in record["hubs"].items() if hub["share_of_energy"] is not None}
    figure, axes = new_figure(1, 2 if hubs else 1, 2.7, alone=PAGE_WIDTH)
    axis, names = axes[0][0], list(record["mlps"])
    axis.bar(range(len(names)), [spread["share90"] or 0.0 for spread in record["mlps"].values()], color="tab:blue")
    axis.axhline(_EVEN, color="grey", linestyle=":", label="spread evenly")
    axis.set_ylim(0, 1)
    label(axis, y="share of the neurons that\nholds 90 % of the update")
    axis.legend(fontsize=8, loc="lower right")
    label_layers(axis, names)
    if hubs:
        axis, places = axes[0][1], range(len(hubs))
        axis.bar(places, [hub["share_of_energy"] for hub in hubs.values()], color="tab:orange", label="hubs")
        null = [hub["share_of_neurons"] for hub in hubs.values()]
        lengths = bars(null, [hub["null_interval"] for hub in hubs.values()])
        axis.errorbar(places, null, lengths, fmt="_", color="black", capsize=4, label="as many random neurons")
        label(axis, y="share of the update")
        axis.legend(fontsize=8)
        label_layers(axis, list(hubs))
    return figure


def _table(record: Mapping[str, Any]) -> Table:
    rows: list[tuple[str, ...]] = []
    for name, spread in record["mlps"].items():
        hub = record["hubs"].get(name) or dict.fromkeys(("share_of_neurons", "share_of_energy", "null_interval"))
        known = (spread["relative"], spread["share90"], hub["share_of_neurons"], hub["share_of_energy"])
        rows.append((name, str(spread["neurons"]), *map(decimal, known), span(hub["null_interval"])))
    for kind, names in by_kind(list(record["layers"])).items():
        layers = [record["layers"][name] for name in names]
        means = [mean_of_known(layer[key] for layer in layers) for key in ("relative", "share90")]
        rows.append((f"{kind}, mean", str(layers[0]["neurons"]), *map(decimal, means), "–", "–", "–"))
    header = ("MLP, or kind of layer", "neurons", "‖ΔW‖/‖W‖", "holds 90 %", "hubs", "their energy", "random neurons'")
    return Table(header, tuple(rows))
