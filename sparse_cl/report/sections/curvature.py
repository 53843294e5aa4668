"""What a report shows of curvature: spectra of the Fisher information, and how much of it is flat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparse_cl.report.section import Section, Table, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_THRESHOLD = 1e-3
_NOTE = (
    "Fisher information of each layer's weight in Kronecker factors, F ≈ S ⊗ A, labels drawn from the model itself "
    "(Martens & Grosse 2015; not the empirical Fisher). A direction is flat at a threshold if its eigenvalue λ_S·λ_A "
    "is at most that share of its layer's largest. Band: the two halves of the batches, an idea of the error, not a "
    "confidence interval. Null: white inputs and gradients of as many tokens (Marchenko & Pastur), which shows what "
    "too few tokens make look flat. Directions that carry the curvature: (Σλ)²/Σλ², of m·n. Shared: ‖UᵀV‖²/k of the "
    "most curved {share:.0%} of the directions; chance k/width; ceiling: two halves of one domain, each with half the "
    "tokens."
)


def section(record: Mapping[str, Any]) -> Section:
    """From `domains`, name -> `Curvature.to_json()`, and, of two and more, `overlap`, of `curvature_overlap`."""
    domains, overlap = record["domains"], record.get("overlap")
    note = _NOTE.format(share=overlap["share"]) if overlap else _NOTE[: _NOTE.index(" Shared:")]
    figures = (_figure(domains),)
    return Section("Curvature: how much is flat?", _sentence(domains, overlap), figures, _table(domains), note)


def _at(record: Mapping[str, Any]) -> int:
    return min(range(len(record["thresholds"])), key=lambda i: abs(record["thresholds"][i] / _THRESHOLD - 1))


def _flat(record: Mapping[str, Any], key: str = "flat") -> list[float]:
    """Mean over layers at each threshold."""
    return [mean(values) for values in zip(*(layer[key] for layer in record["layers"].values()), strict=True)]


def _flat_halves(record: Mapping[str, Any]) -> list[list[float]] | None:
    halves = [layer["flat_halves"] for layer in record["layers"].values()]
    if None in halves:
        return None
    return [[mean(values) for values in zip(*some, strict=True)] for some in zip(*halves, strict=True)]


def _sentence(domains: Mapping[str, Mapping[str, Any]], overlap: Mapping[str, Any] | None) -> str:
    first = next(iter(domains.values()))
    at = _at(first)
    flat = {name: _flat(record)[at] for name, record in domains.items()}
    null = mean(_flat(record, "flat_null")[at] for record in domains.values())
    average = mean(flat.values())
    spread = "" if len(flat) == 1 else f" ({', '.join(f'{name} {share:.1%}' for name, share in flat.items())})"
    text = (
        f"On average over layers {average:.1%} of the directions of a weight are flat{spread}, at "
        f"{first['thresholds'][at]:g} of the largest eigenvalue; of white noise {null:.1%} would be"
    )
    if average <= null:
        text += ", so nothing is flatter than chance"
    shares = [
        layer["effective_directions"] / (layer["shape"][0] * layer["shape"][1])
        for record in domains.values()
        for layer in record["layers"].values()
    ]
    text += f". The curvature is carried by {mean(shares):.2%} of the directions"
    if overlap:
        text += ". " + "; ".join(_shared(overlap, kind) for kind in ("inputs", "outputs"))
    return text + "."


def _shared(overlap: Mapping[str, Any], kind: str) -> str:
    layers = overlap["layers"].values()
    found = mean(value for layer in layers for value in layer[kind])
    null = mean(layer[f"{kind}_null"] for layer in layers)
    ceilings = [value for layer in layers for value in layer[f"{kind}_ceiling"] if value is not None]
    ceiling = f", ceiling {mean(ceilings):.2f}" if ceilings else ""
    name = {"inputs": "Of the most curved input directions two domains share", "outputs": "of those of the outputs"}
    return f"{name[kind]} {found:.2f} (chance {null:.2f}{ceiling})"


def _figure(domains: Mapping[str, Mapping[str, Any]]) -> Figure:
    import numpy as np

    figure, axes = new_figure(1, 3, height=3.2)
    for number, (name, record) in enumerate(domains.items()):
        colour = f"C{number % 10}"
        for axis, key in zip(axes[0], ("inputs", "outputs"), strict=False):
            axis.plot(*_mean_spectrum(record, key, np), color=colour, label=name)
        thresholds, flat = record["thresholds"], _flat(record)
        axes[0][2].plot(thresholds, flat, "o-", color=colour, markersize=3, label=name)
        if halves := _flat_halves(record):
            axes[0][2].fill_between(thresholds, *halves, color=colour, alpha=0.25, linewidth=0)
    null = [mean(values) for values in zip(*(_flat(record, "flat_null") for record in domains.values()), strict=True)]
    axes[0][2].plot(thresholds, null, "--", color="grey", label="white noise (null)")
    for axis, title in zip(axes[0], ("inputs, A", "gradients at the outputs, S"), strict=False):
        axis.set_yscale("log")
        axis.set_ylim(max(1e-9, axis.get_ylim()[0]), 2)
        axis.set_xlabel("share of the directions", fontsize=8)
        axis.set_title(title, fontsize=9)
    axes[0][0].set_ylabel("eigenvalue / largest, geometric mean over layers", fontsize=8)
    axes[0][2].set_xscale("log")
    axes[0][2].set_ylim(-0.02, 1.02)
    axes[0][2].set_xlabel("threshold, share of the largest λ_S·λ_A", fontsize=8)
    axes[0][2].set_title("share of flat directions, mean over layers", fontsize=9)
    for axis in axes[0]:
        axis.tick_params(labelsize=8)
    axes[0][2].legend(fontsize=8)
    return figure


def _mean_spectrum(record: Mapping[str, Any], key: str, np: Any) -> tuple[Any, Any]:
    """Shares of the directions, and the geometric mean over layers of eigenvalue over largest."""
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
    at = _at(first)
    header: tuple[str, ...] = ("layer", "m × n")
    header += (
        tuple(f"flat, {name}" for name in domains) + ("white noise",) + tuple(f"carry, {name}" for name in domains)
    )
    rows = []
    for name, layer in first["layers"].items():
        of: Sequence[Mapping[str, Any]] = [record["layers"][name] for record in domains.values()]
        rows.append(
            (
                name,
                "{} × {}".format(*layer["shape"]),
                *(f"{one['flat'][at]:.3f}" for one in of),
                f"{mean(one['flat_null'][at] for one in of):.3f}",
                *(f"{one['effective_directions']:.0f}" for one in of),
            )
        )
    return Table(header, tuple(rows))
