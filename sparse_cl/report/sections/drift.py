"""What a report shows of drift."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparse_cl.report.section import Section, Table, decimal, span

from .drawing import label, label_layers, new_figure

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
_PANELS = {
    "cka": "1 − CKA",
    "overlap": "span kept",
    "displacement": "displacement of the mean\n(standard deviations)",
    "change": "change\nE‖y − x‖² / E‖x − E x‖²",
}


def section(record: Mapping[str, Any]) -> Section:
    """From `Drift.to_json()`."""
    layers = record["layers"]
    return Section("Drift of hidden states", _sentence(layers), (_figure(layers),), _table(layers), _NOTE)


def _sentence(layers: Mapping[str, Mapping[str, Any]]) -> str:
    first = next(iter(layers.values()))
    where = f"On {first['tokens']} tokens of the reference text"
    if not any(layer["change"] or layer["displacement"] or layer["overlap"] != 1 for layer in layers.values()):
        return f"{where} no hidden state changed in any bit: there is no drift in any of the {len(layers)} layers."
    known = {name: 1 - layer["cka"] for name, layer in layers.items() if layer["cka"] is not None}
    if known:
        most = max(known, key=known.__getitem__)
        halves = _halves(layers[most], "cka")
        interval = f"; the halves of the text give {span([1 - half for half in halves])}" if halves else ""
        text = (
            f"{where} 1 − CKA of the hidden states before and after is {decimal(mean(known.values()))} on average over "
            f"{len(known)} layers (0: no drift, 1: unrelated), and most in {most}, {decimal(known[most])}{interval}"
        )
    else:
        text = f"{where} CKA is not defined in any layer: there the hidden states do not vary"
    kept, chance, moved = (
        mean(layer[key] for layer in layers.values()) for key in ("overlap", "null_overlap", "displacement")
    )
    ceilings = [layer["ceiling_overlap"] for layer in layers.values()]
    ceiling = (
        "" if None in ceilings else f"; two halves of the text agree to {decimal(mean(ceilings))} without any training"
    )
    explained = ", no less than estimation explains" if ceiling and kept >= mean(ceilings) else ""
    return (
        f"{text}; the {first['rank']} leading directions keep {decimal(kept)} of their span (chance {decimal(chance)}"
        f"{ceiling}){explained}; along them the mean moved by {decimal(moved)} standard deviations."
    )


def _figure(layers: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure, axes = new_figure(2, 2, 2.4)
    for axis, (key, title) in zip(axes.flat, _PANELS.items(), strict=True):
        for place, layer in enumerate(layers.values()):
            values = [1 - value if key == "cka" else value for value in _halves(layer, key)]
            if layer[key] is None:
                continue
            axis.plot(place, 1 - layer[key] if key == "cka" else layer[key], "o", color="tab:blue", markersize=5)
            if values:
                axis.plot([place] * 2, values, "_-", color="tab:blue", markersize=9)
        label(axis, y=title)
        label_layers(axis, list(layers))
    overlap = axes[0][1]
    for key, look, title in (
        ("null_overlap", {"color": "grey", "linestyle": ":"}, "chance (k/width)"),
        ("ceiling_overlap", {"color": "tab:green", "linestyle": "--"}, "ceiling"),
    ):
        known = [(place, layer[key]) for place, layer in enumerate(layers.values()) if layer[key] is not None]
        if known:
            overlap.plot(*zip(*known, strict=True), marker="_", label=title, **look)
    overlap.set_ylim(0, 1.03)
    overlap.legend(fontsize=8, loc="center right")
    for axis in (axes[0][0], *axes[1]):
        # Before the lower limit is set: a fixed one keeps the margin off the upper.
        axis.set_ylim(0, axis.get_ylim()[1])
    return figure


def _table(layers: Mapping[str, Mapping[str, Any]]) -> Table:
    def known(key: str) -> list[str]:
        return [decimal(layer[key]) for layer in layers.values()]

    def halves(key: str) -> list[str]:
        return [span(_halves(layer, key)) for layer in layers.values()]

    return Table.of_columns(
        [
            ("layer", list(layers)),
            ("CKA", known("cka")),
            ("(halves)", halves("cka")),
            ("span kept", known("overlap")),
            ("chance", known("null_overlap")),
            ("ceiling", known("ceiling_overlap")),
            ("displacement", known("displacement")),
            ("(halves)", halves("displacement")),
            ("change", known("change")),
        ]
    )


def _halves(layer: Mapping[str, Any], key: str) -> list[float]:
    values = [half[key] for half in layer["halves"] or ()]
    return [] if None in values else values
