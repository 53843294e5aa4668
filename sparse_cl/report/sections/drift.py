"""What a report shows of drift."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparse_cl.report.section import Section, Table, decimal, new_figure, span

from .layer_axis import label_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NOTE = (
    "x and y: a token's hidden state before and after, the output of a residual block. CKA: linear, debiased (unbiased "
    "HSIC, Song et al. 2012; Nguyen et al. 2021); 1 for the same features up to rotation and scale, 0 for unrelated "
    "ones. Span kept: ‖UᵀV‖²/k of the k leading principal directions; chance is k/width, and the ceiling is what the "
    "two halves of the text give before training. Displacement: root mean square over these k directions of how far "
    "the mean moved, in standard deviations of x there. Change: E‖y − x‖² / E‖x − E x‖². Intervals are the two halves "
    "of the text (even and odd sequences), each an estimate of half the tokens, not a confidence interval. A rotation "
    "that later layers undo counts in the last three, and not in CKA."
)


def section(record: Mapping[str, Any]) -> Section:
    """From `Drift.to_json()`."""
    layers = record["layers"]
    return Section("Drift of hidden states", _sentence(layers), (_figure(layers),), _table(layers), _NOTE)


def _sentence(layers: Mapping[str, Mapping[str, Any]]) -> str:
    first = next(iter(layers.values()))
    where = f"On {first['tokens']} tokens of the reference text"
    known = {name: 1 - layer["cka"] for name, layer in layers.items() if layer["cka"] is not None}
    if not any(layer["change"] or layer["displacement"] for layer in layers.values()) and all(
        layer["overlap"] == 1 for layer in layers.values()
    ):
        return f"{where} no hidden state changed in any bit: there is no drift in any of the {len(layers)} layers."
    parts = []
    if known:
        most = max(known, key=known.__getitem__)
        halves = _halves(layers[most], "cka")
        interval = f"; the halves of the text give {span([1 - half for half in halves])}" if halves else ""
        parts.append(
            f"{where} 1 − CKA of the hidden states before and after is {decimal(mean(known.values()))} on average over "
            f"{len(known)} layers (0: no drift, 1: unrelated), and most in {most}, {decimal(known[most])}{interval}"
        )
    else:
        parts.append(f"{where} CKA is not defined in any layer: there the hidden states do not vary")
    overlaps = [layer["overlap"] for layer in layers.values()]
    ceilings = [layer["ceiling_overlap"] for layer in layers.values() if layer["ceiling_overlap"] is not None]
    ceiling = mean(ceilings) if len(ceilings) == len(layers) else None
    text = (
        f"the {first['rank']} leading directions keep {decimal(mean(overlaps))} of their span (chance "
        f"{decimal(mean(layer['null_overlap'] for layer in layers.values()))}"
    )
    if ceiling is not None:
        text += f"; two halves of the text agree to {decimal(ceiling)} without any training"
    parts.append(
        text + ")" + (", no less than estimation explains" if ceiling is not None and mean(overlaps) >= ceiling else "")
    )
    moved = mean(layer["displacement"] for layer in layers.values())
    parts.append(f"along them the mean moved by {decimal(moved)} standard deviations")
    return "; ".join(parts) + "."


def _figure(layers: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure, axes = new_figure(2, 2, height=2.4)
    panels = (
        ("cka", "1 − CKA", lambda value: 1 - value),
        ("overlap", "span kept", lambda value: value),
        ("displacement", "displacement of the mean\n(standard deviations)", lambda value: value),
        ("change", "change\nE‖y − x‖² / E‖x − E x‖²", lambda value: value),
    )
    for axis, (key, label, shown) in zip(axes.flat, panels, strict=True):
        for place, layer in enumerate(layers.values()):
            if layer[key] is None:
                continue
            axis.plot(place, shown(layer[key]), "o", color="tab:blue", markersize=5)
            if halves := _halves(layer, key):
                axis.plot([place] * 2, [shown(half) for half in halves], "_-", color="tab:blue", markersize=9)
        axis.set_ylabel(label, fontsize=8)
        label_layers(axis, list(layers))
    places = range(len(layers))
    overlap = axes[0][1]
    null = [layer["null_overlap"] for layer in layers.values()]
    overlap.plot(places, null, color="grey", linestyle=":", marker="_", label="chance (k/width)")
    ceilings = [(place, layer["ceiling_overlap"]) for place, layer in enumerate(layers.values())]
    ceilings = [(place, value) for place, value in ceilings if value is not None]
    if ceilings:
        overlap.plot(*zip(*ceilings, strict=True), color="tab:green", linestyle="--", marker="_", label="ceiling")
    overlap.set_ylim(0, 1.03)
    overlap.legend(fontsize=8, loc="center right")
    for axis in (axes[0][0], *axes[1]):
        # Before the lower limit is set: a fixed one keeps the margin off the upper.
        axis.set_ylim(0, axis.get_ylim()[1])
    return figure


def _table(layers: Mapping[str, Mapping[str, Any]]) -> Table:
    header = ("layer", "CKA", "(halves)", "span kept", "chance", "ceiling", "displacement", "(halves)", "change")
    rows = []
    for name, layer in layers.items():
        rows.append(
            (
                name,
                decimal(layer["cka"]),
                span(_halves(layer, "cka")),
                decimal(layer["overlap"]),
                decimal(layer["null_overlap"]),
                decimal(layer["ceiling_overlap"]),
                decimal(layer["displacement"]),
                span(_halves(layer, "displacement")),
                decimal(layer["change"]),
            )
        )
    return Table(header, tuple(rows))


def _halves(layer: Mapping[str, Any], key: str) -> list[float]:
    values = [half[key] for half in layer["halves"] or ()]
    return [] if None in values else values
