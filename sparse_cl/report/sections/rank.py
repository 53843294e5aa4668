"""What a report shows of the ranks of hidden states and of updates."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparse_cl.four_domains.figures import by_kind
from sparse_cl.report.section import Section, Table

from .drawing import beside, label, label_layers, legend_above, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RANKS = {"effective_rank": "effective rank", "stable_rank": "stable rank"}
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
    sentence, figures = _of_features(features), [_features(features)]
    if updates and updates["weights"]:
        sentence += " " + _of_updates(updates["weights"])
        figures.append(_updates(updates["weights"]))
    return Section("Rank", sentence, tuple(figures), _table(features), note)


def _of_features(features: Mapping[str, Mapping[str, Any]]) -> str:
    layers = {name: list(record["layers"].values()) for name, record in features.items()}
    each = []
    for name, found in layers.items():
        shares = mean(x["effective_rank"] / x["gaussian_effective_rank"] for x in found)
        each.append(f"{mean(x['effective_rank'] for x in found):.0f} ({name}, {shares:.0%} of random features')")
    width = mean(x["width"] for x in next(iter(layers.values())))
    text = f"The effective rank of the hidden states is {', '.join(each)} of {width:.0f} dimensions, mean over layers"
    if list(features) == ["before", "after"]:
        pairs = list(zip(layers["before"], layers["after"], strict=True))
        lower = sum(after["effective_rank"] < before["effective_rank"] for before, after in pairs)
        higher = sum(after["effective_rank"] > before["effective_rank"] for before, after in pairs)
        clear = sum(_apart(before["effective_rank_halves"], after["effective_rank_halves"]) for before, after in pairs)
        text += (
            f"; after training it is lower in {lower} and higher in {higher} of {len(pairs)} layers, in {clear} of "
            "them by more than the two halves of the text differ"
        )
    return text + "."


def _apart(before: list[float] | None, after: list[float] | None) -> bool:
    """Whether two intervals have nothing in common; not where one is not known."""
    return before is not None and after is not None and (max(before) < min(after) or max(after) < min(before))


def _of_updates(weights: Mapping[str, Mapping[str, Any]]) -> str:
    changed = [w for w in weights.values() if w["effective_rank"] > 0]
    if not changed:
        return f"None of the {len(weights)} weight matrices changed."
    share, stable = (mean(w[rank] / w[f"gaussian_{rank}"] for w in changed) for rank in _RANKS)
    size = [w["change"] for w in changed if w["change"] is not None]
    by = f", by {mean(size):.2g} of their norm on average" if size else ""
    return (
        f"{len(changed)} of {len(weights)} weight matrices changed{by}; their updates have {share:.0%} of the "
        f"effective rank and {stable:.0%} of the stable rank of random ones."
    )


def _features(features: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure, axes = new_figure(1, 3, 2.7)
    for axis, (key, rank) in zip(axes[0], _RANKS.items(), strict=False):
        for number, (name, record) in enumerate(features.items()):
            colour, layers = f"C{number}", list(record["layers"].values())
            places = beside(number, len(features), len(layers), 0.12)
            axis.plot(places, [x[key] for x in layers], "o-", color=colour, markersize=4, label=name, linewidth=1)
            for place, layer in zip(places, layers, strict=True):
                if halves := layer[f"{key}_halves"]:
                    axis.plot([place] * 2, halves, "-", color=colour, linewidth=3, alpha=0.5)
        first = next(iter(features.values()))["layers"]
        random = [layer[f"gaussian_{key}"] for layer in first.values()]
        axis.plot(range(len(first)), random, color="grey", linestyle=":", label="random")
        axis.set_ylim(0, None)
        label(axis, y=f"{rank} of hidden states")
        label_layers(axis, list(first))
    last = axes[0][2]
    for number, (name, record) in enumerate(features.items()):
        layer, found = list(record["layers"].items())[-1]
        # Zeros have no place on a logarithmic axis.
        spectrum = [value for value in found["spectrum"] if value > 0]
        last.plot(range(1, len(spectrum) + 1), spectrum, color=f"C{number}", label=name)
    last.set(xscale="log", yscale="log")
    label(last, "direction", f"standard deviation\nin {layer}")
    legend_above(figure, axes[0][0])
    return figure


def _updates(weights: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure, axes = new_figure(1, 2, 2.7)
    all_kinds = by_kind(list(weights))
    kinds = {kind: names for kind, names in all_kinds.items() if len(names) > 1} or all_kinds
    for axis, (key, rank) in zip(axes[0], _RANKS.items(), strict=True):
        for kind, names in kinds.items():
            shares = [weights[name][key] / weights[name][f"gaussian_{key}"] for name in names]
            axis.plot(range(len(names)), shares, "o-", markersize=4, linewidth=1, label=kind)
        axis.axhline(1, color="grey", linestyle=":", label="random")
        axis.set_ylim(0, None)
        label(axis, y=f"{rank} of updates\nover that of random ones")
        label_layers(axis, max(kinds.values(), key=len))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    return figure


def _table(features: Mapping[str, Mapping[str, Any]]) -> Table:
    first = next(iter(features.values()))["layers"]
    columns = [("layer", list(first)), ("width", [str(layer["width"]) for layer in first.values()])]
    for name, record in features.items():
        layers = [record["layers"][layer] for layer in first]
        halves = [layer["effective_rank_halves"] for layer in layers]
        columns += [
            (f"effective rank, {name}", [f"{layer['effective_rank']:.1f}" for layer in layers]),
            ("(halves)", [f"{min(both):.1f} to {max(both):.1f}" if both else "–" for both in halves]),
            (f"stable rank, {name}", [f"{layer['stable_rank']:.1f}" for layer in layers]),
        ]
    for kind in ("effective", "stable"):
        columns.append((f"random, {kind}", [f"{layer[f'gaussian_{kind}_rank']:.1f}" for layer in first.values()]))
    return Table.of_columns(columns)
