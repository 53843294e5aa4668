"""What a report shows of the ranks of hidden states and of updates."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparse_cl.four_domains.figures import by_kind
from sparse_cl.report.section import Section, Table, new_figure

from .layer_axis import label_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NOTE = (
    "Effective rank: exp of the entropy of σ/Σσ (Roy & Vetterli 2007); stable rank: Σσ²/σ₁². Of hidden states: σ are "
    "the singular values of the matrix of all tokens' states{centered}; of an update: those of ΔW. Random: a Gaussian "
    "matrix of the same shape, the null; the ceiling is the smaller of the two sides. Bars and brackets: the even and "
    "the odd sequences alone, half the tokens each, which lowers a rank a little; an update's rank has no interval, as "
    "it is computed from all of it."
)


def section(features: Mapping[str, Mapping[str, Any]], updates: Mapping[str, Any] | None = None) -> Section:
    """From `Features.to_json()` by name: "before" and "after", or domains; and from `UpdateRanks.to_json()`."""
    first = next(iter(features.values()))
    note = _NOTE.format(centered=", their mean taken off" if first["centered"] else "")
    weights = (updates or {}).get("weights", {})
    parts = [_of_features(features)] + ([_of_updates(weights)] if weights else [])
    return Section(
        "Rank",
        " ".join(parts),
        (_features(features), *([_updates(weights)] if weights else [])),
        _table(features),
        note,
    )


def _of_features(features: Mapping[str, Mapping[str, Any]]) -> str:
    layers = {name: list(record["layers"].values()) for name, record in features.items()}
    shares = {
        name: [x["effective_rank"] / x["gaussian_effective_rank"] for x in found] for name, found in layers.items()
    }
    each = ", ".join(
        f"{mean(x['effective_rank'] for x in found):.0f} ({name}, {mean(shares[name]):.0%} of random features')"
        for name, found in layers.items()
    )
    width = mean(x["width"] for x in next(iter(layers.values())))
    text = f"The effective rank of the hidden states is {each} of {width:.0f} dimensions, mean over layers"
    if list(features) == ["before", "after"]:
        pairs = list(zip(layers["before"], layers["after"], strict=True))
        lower = sum(after["effective_rank"] < before["effective_rank"] for before, after in pairs)
        higher = sum(after["effective_rank"] > before["effective_rank"] for before, after in pairs)
        clear = sum(_apart(before, after) for before, after in pairs)
        text += (
            f"; after training it is lower in {lower} and higher in {higher} of {len(pairs)} layers, in {clear} of "
            "them by more than the two halves of the text differ"
        )
    return text + "."


def _apart(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    if not (before["effective_rank_halves"] and after["effective_rank_halves"]):
        return False
    (low, high), (other_low, other_high) = (sorted(x["effective_rank_halves"]) for x in (before, after))
    return high < other_low or other_high < low


def _of_updates(weights: Mapping[str, Mapping[str, Any]]) -> str:
    changed = [w for w in weights.values() if w["effective_rank"] > 0]
    if not changed:
        return f"None of the {len(weights)} weight matrices changed."
    share = mean(w["effective_rank"] / w["gaussian_effective_rank"] for w in changed)
    stable = mean(w["stable_rank"] / w["gaussian_stable_rank"] for w in changed)
    size = [w["change"] for w in changed if w["change"] is not None]
    text = f"{len(changed)} of {len(weights)} weight matrices changed"
    text += f", by {mean(size):.2g} of their norm on average" if size else ""
    return text + (
        f"; their updates have {share:.0%} of the effective rank and {stable:.0%} of the stable rank of random ones."
    )


def _features(features: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure, axes = new_figure(1, 3, height=2.7)
    for axis, key, label in zip(
        axes[0], ("effective_rank", "stable_rank"), ("effective rank", "stable rank"), strict=False
    ):
        for number, (name, record) in enumerate(features.items()):
            layers = list(record["layers"].values())
            places = [place + 0.12 * (number - (len(features) - 1) / 2) for place in range(len(layers))]
            axis.plot(places, [x[key] for x in layers], "o-", color=f"C{number}", markersize=4, label=name, linewidth=1)
            for place, layer in zip(places, layers, strict=True):
                if halves := layer[f"{key}_halves"]:
                    axis.plot([place] * 2, halves, "-", color=f"C{number}", linewidth=3, alpha=0.5)
        layers = next(iter(features.values()))["layers"]
        random = [x[f"gaussian_{key}"] for x in layers.values()]
        axis.plot(range(len(layers)), random, color="grey", linestyle=":", label="random")
        axis.set_ylabel(f"{label} of hidden states", fontsize=8)
        axis.set_ylim(0, None)
        label_layers(axis, list(layers))
    last = axes[0][2]
    for number, (name, record) in enumerate(features.items()):
        layer, found = list(record["layers"].items())[-1]
        # Zeros have no place on a logarithmic axis.
        spectrum = [value for value in found["spectrum"] if value > 0]
        last.plot(range(1, len(spectrum) + 1), spectrum, color=f"C{number}", label=name)
    last.set_xscale("log")
    last.set_yscale("log")
    last.set_xlabel("direction", fontsize=8)
    last.set_ylabel(f"standard deviation\nin {layer}", fontsize=8)
    last.tick_params(labelsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    return figure


def _updates(weights: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure, axes = new_figure(1, 2, height=2.7)
    kinds = {kind: names for kind, names in by_kind(list(weights)).items() if len(names) > 1} or by_kind(list(weights))
    for axis, key in zip(axes[0], ("effective_rank", "stable_rank"), strict=True):
        for kind, names in kinds.items():
            shares = [weights[name][key] / weights[name][f"gaussian_{key}"] for name in names]
            axis.plot(range(len(names)), shares, "o-", markersize=4, linewidth=1, label=kind)
        axis.axhline(1, color="grey", linestyle=":", label="random")
        axis.set_ylim(0, None)
        axis.set_ylabel(f"{key.replace('_', ' ')} of updates\nover that of random ones", fontsize=8)
        label_layers(axis, max(kinds.values(), key=len))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    return figure


def _table(features: Mapping[str, Mapping[str, Any]]) -> Table:
    header = ["layer", "width"]
    for name in features:
        header += [f"effective rank, {name}", "(halves)", f"stable rank, {name}"]
    header += ["random, effective", "random, stable"]
    layers = next(iter(features.values()))["layers"]
    rows = []
    for layer, first in layers.items():
        row = [layer, str(first["width"])]
        for record in features.values():
            found = record["layers"][layer]
            halves = found["effective_rank_halves"]
            row += [
                f"{found['effective_rank']:.1f}",
                f"{min(halves):.1f} to {max(halves):.1f}" if halves else "–",
                f"{found['stable_rank']:.1f}",
            ]
        rows.append((*row, f"{first['gaussian_effective_rank']:.1f}", f"{first['gaussian_stable_rank']:.1f}"))
    return Table(tuple(header), tuple(rows))
