"""What a report shows of curvature: spectra of the Fisher information, and how much of it is flat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparse_cl.report.section import Section, Table, mean_of_known, nearest

from .drawing import label, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_THRESHOLD = 1e-3
_NOTE = (
    "Fisher information of each layer's weight in Kronecker factors, F ≈ S ⊗ A, labels drawn from the model itself "
    "(Martens & Grosse 2015; not the empirical Fisher). A direction is flat at a threshold if its eigenvalue λ_S·λ_A "
    "is at most that share of its layer's largest. Band: the two halves of the batches, an idea of the error, not a "
    "confidence interval. Null: white inputs and gradients of as many tokens (Marchenko & Pastur), which shows what "
    "too few tokens make look flat. Directions that carry the curvature: (Σλ)²/Σλ², of m·n."
)
_SHARED = (
    " Shared: ‖UᵀV‖²/k of the most curved {share:.0%} of the directions; chance k/width; ceiling: two halves of one "
    "domain, each with half the tokens."
)


def section(record: Mapping[str, Any]) -> Section:
    """From `domains`, name -> `Curvature.to_json()`, and, of two and more, `overlap`, of `curvature_overlap`."""
    domains, overlap = record["domains"], record.get("overlap")
    sentence, note = _sentence(domains), _NOTE
    if overlap:
        sentence += " " + _shared(overlap)
        note += _SHARED.format(share=overlap["share"])
    return Section("Curvature: how much is flat?", sentence, (_figure(domains),), _table(domains), note)


def _at(record: Mapping[str, Any]) -> int:
    return nearest(record["thresholds"], _THRESHOLD)


def _means(lists: Sequence[Sequence[float]]) -> list[float]:
    """Mean of the lists, entry by entry."""
    return [mean(values) for values in zip(*lists, strict=True)]


def _flat(record: Mapping[str, Any], key: str = "flat") -> list[float]:
    """Mean over layers at each threshold."""
    return _means([layer[key] for layer in record["layers"].values()])


def _sentence(domains: Mapping[str, Mapping[str, Any]]) -> str:
    first = next(iter(domains.values()))
    at = _at(first)
    flat = {name: _flat(record)[at] for name, record in domains.items()}
    null = mean(_flat(record, "flat_null")[at] for record in domains.values())
    average = mean(flat.values())
    spread = "" if len(flat) == 1 else f" ({', '.join(f'{name} {share:.1%}' for name, share in flat.items())})"
    shares = [
        layer["effective_directions"] / (layer["shape"][0] * layer["shape"][1])
        for record in domains.values()
        for layer in record["layers"].values()
    ]
    return (
        f"On average over layers {average:.1%} of the directions of a weight are flat{spread}, at "
        f"{first['thresholds'][at]:g} of the largest eigenvalue; of white noise {null:.1%} would be"
        f"{', so nothing is flatter than chance' if average <= null else ''}. The curvature is carried by "
        f"{mean(shares):.2%} of the directions."
    )


def _shared(overlap: Mapping[str, Any]) -> str:
    layers, told = overlap["layers"].values(), {}
    for kind in ("inputs", "outputs"):
        found = mean(value for layer in layers for value in layer[kind])
        ceiling = mean_of_known(value for layer in layers for value in layer[f"{kind}_ceiling"])
        limit = "" if ceiling is None else f", ceiling {ceiling:.2f}"
        told[kind] = f"{found:.2f} (chance {mean(layer[f'{kind}_null'] for layer in layers):.2f}{limit})"
    return (
        f"Of the most curved input directions two domains share {told['inputs']}; of those of the outputs "
        f"{told['outputs']}."
    )


def _figure(domains: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure, axes = new_figure(1, 3, 3.2)
    spectra = dict(zip(("inputs", "outputs"), axes[0], strict=False))
    flatness = axes[0][2]
    for number, (name, record) in enumerate(domains.items()):
        colour = f"C{number % 10}"
        for key, axis in spectra.items():
            axis.plot(*_mean_spectrum(record, key), color=colour, label=name)
        thresholds = record["thresholds"]
        flatness.plot(thresholds, _flat(record), "o-", color=colour, markersize=3, label=name)
        halves = [layer["flat_halves"] for layer in record["layers"].values()]
        if None not in halves:
            means = [_means(half) for half in zip(*halves, strict=True)]
            flatness.fill_between(thresholds, *means, color=colour, alpha=0.25, linewidth=0)
    null = _means([_flat(record, "flat_null") for record in domains.values()])
    flatness.plot(thresholds, null, "--", color="grey", label="white noise (null)")
    for axis, title in zip(spectra.values(), ("inputs, A", "gradients at the outputs, S"), strict=True):
        axis.set_yscale("log")
        axis.set_ylim(max(1e-9, axis.get_ylim()[0]), 2)
        label(axis, "share of the directions", title=title)
    label(axes[0][0], y="eigenvalue / largest, geometric mean over layers")
    flatness.set(xscale="log", ylim=(-0.02, 1.02))
    label(flatness, "threshold, share of the largest λ_S·λ_A", title="share of flat directions, mean over layers")
    flatness.legend(fontsize=8)
    return figure


def _mean_spectrum(record: Mapping[str, Any], key: str) -> tuple[Any, Any]:
    """Shares of the directions, and the geometric mean over layers of eigenvalue over largest."""
    import numpy as np

    shares = np.linspace(0, 1, 64)
    logs = []
    for layer in record["layers"].values():
        values = np.array(layer[key])
        if values[0] > 0:
            relative = np.log(np.maximum(values / values[0], 1e-12))
            logs.append(np.interp(shares, np.linspace(0, 1, len(values)), relative))
    return shares, np.exp(np.mean(logs, 0)) if logs else np.full(64, np.nan)


def _table(domains: Mapping[str, Mapping[str, Any]]) -> Table:
    first = next(iter(domains.values()))
    at, names = _at(first), list(first["layers"])
    of = {domain: [record["layers"][name] for name in names] for domain, record in domains.items()}
    nulls = [mean(layer["flat_null"][at] for layer in layers) for layers in zip(*of.values(), strict=True)]
    return Table.of_columns(
        [
            ("layer", names),
            ("m × n", ["{} × {}".format(*layer["shape"]) for layer in first["layers"].values()]),
            *((f"flat, {domain}", [f"{layer['flat'][at]:.3f}" for layer in layers]) for domain, layers in of.items()),
            ("white noise", [f"{null:.3f}" for null in nulls]),
            *(
                (f"carry, {d}", [f"{layer['effective_directions']:.0f}" for layer in layers])
                for d, layers in of.items()
            ),
        ]
    )
