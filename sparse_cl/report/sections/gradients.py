"""What a report shows of the domains' gradients: cosines, shared directions, interference."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparse_cl.four_domains.figures import PAGE_WIDTH, by_kind
from sparse_cl.report.section import Section, Table, decimal, mean_of_known, within

from .drawing import bands, label, legend_above, new_figure, new_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = 12
_NOTE = (
    "Mean gradients of the answer loss over the tokens of each domain. Grey band: ±1.96/√d, where 95 % of pairs of "
    "isotropic random vectors of d entries lie; real gradients have far fewer directions than entries, how many is not "
    "known, so a cosine beyond the band need not mean that domains are related. Bars: 95 % intervals of what another "
    "sample of as many tokens would show. Ceiling: √(r_A r_B), r the split-half reliability, what two samples of one "
    "domain would show; corrected: cosine / ceiling. Shared input directions: ‖UᵀV‖²/k of the {rank} leading right "
    "singular vectors, chance k/n."
)
_INTERFERENCE = (
    " Interference: a step of {relative_step:.2g} of the weights' norm down the gradient of the domain below, and what "
    "it adds to the loss of the domain at the left: first order −η g_A·g_B/‖g_B‖, and measured."
)


def section(cosines: Mapping[str, Any], interference: Mapping[str, Any] | None = None) -> Section:
    """From `GradientComparison.to_json()` and `Interference.to_json()`."""
    sentence, figures, note = _sentence(cosines), [_cosine_figure(cosines)], _NOTE.format(rank=cosines["rank"])
    if interference is not None:
        sentence += " " + _interference_sentence(interference)
        figures.append(_interference_figure(interference))
        note += _INTERFERENCE.format(**interference)
    return Section("Gradients: do domains pull the same way?", sentence, tuple(figures), _table(cosines), note)


def _pairs(cosines: Mapping[str, Any]) -> list[str]:
    return [f"{a} – {b}" for a, b in cosines["pairs"]]


def _sentence(cosines: Mapping[str, Any]) -> str:
    whole = cosines["model"]
    known = [i for i, value in enumerate(whole["cosine"]) if value is not None]
    if not known:
        return "No pair of domains has gradients to compare: they are zero."
    closest, farthest = (pick(known, key=lambda i: abs(whole["cosine"][i])) for pick in (max, min))

    def told(i: int) -> str:
        a, b = cosines["pairs"][i]
        interval = within([whole["low"][i], whole["high"][i]], ".2f")
        ceiling = "" if whole["ceiling"][i] is None else f", ceiling {whole['ceiling'][i]:.2f}"
        return f"{whole['cosine'][i]:.2f}{interval} between {a} and {b} (null ±{whole['null']:.1g}{ceiling})"

    text = f"The cosine of the whole model's gradients is {told(closest)}"
    if closest != farthest:
        text += f", the largest of {len(known)} pairs, and {told(farthest)}, the smallest"
    found, shared = [], []
    for layer in cosines["layers"].values():
        found += [(abs(value), layer["null"]) for value in layer["cosine"] if value is not None]
        shared += [pair for pair in zip(layer["overlap"], layer["overlap_null"], strict=True) if pair[0] is not None]
    outside = sum(value > null for value, null in found)
    verdict = (
        "so domains do not share directions more than isotropic gradients do"
        if outside <= 0.1 * len(found)
        else "so the layers' gradients are not independent random directions"
    )
    text += (
        f". By layer, {outside} of {len(found)} cosines lie outside the isotropic null (mean |cosine| "
        f"{mean(value for value, _ in found):.2f}, {mean(value / null for value, null in found):.1f} times its bound), "
        f"{verdict}"
    )
    if shared:
        values, nulls = zip(*shared, strict=True)
        text += f"; {mean(values):.2f} of their leading input directions are shared (chance {mean(nulls):.2f})"
    return text + "."


def _interference_sentence(record: Mapping[str, Any]) -> str:
    domains, relative, count = record["domains"], record["relative"], len(record["domains"])
    own = mean(relative[i][i] for i in range(count))
    if count < 2:
        return f"A step changes the domain's own loss by {_percent(own)}."
    others = [(relative[i][j], domains[i], domains[j]) for i in range(count) for j in range(count) if i != j]
    raised = [entry for entry in others if entry[0] > 0]
    text = (
        f"A step on one domain changes its own loss by {_percent(own)} on average and the others' by "
        f"{_percent(mean(value for value, _, _ in others))}; it raises another domain's loss in {len(raised)} of "
        f"{len(others)} cases"
    )
    if raised:
        value, on, by = max(raised)
        text += f", most that of {on} after a step on {by}, by {_percent(value)}"
    return text + "."


def _percent(share: float) -> str:
    return f"{100 * share:+.2g} %".replace("-", "−")


def _cosine_figure(cosines: Mapping[str, Any]) -> Figure:
    names = _pairs(cosines)[:_PANELS]
    kinds = by_kind(list(cosines["layers"]))
    figure, axes = new_grid(len(names), alone=PAGE_WIDTH)
    for number, (axis, name) in enumerate(zip(axes, names, strict=True)):
        _draw_cosines(axis, number, cosines, kinds)
        label(axis, "block", title=name)
    limits = [axis.get_ylim() for axis in axes]
    for axis in axes:
        axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    label(axes[0], y="cosine")
    legend_above(figure, axes[0], most=7)
    hidden = len(cosines["pairs"]) - len(names)
    more = f"; {hidden} more pairs are in the table" if hidden else ""
    figure.supxlabel(
        f"dot: a layer, with its interval; dash: ceiling; grey band: isotropic null; dotted: whole model{more}",
        fontsize=8,
    )
    return figure


def _draw_cosines(axis: Axes, pair: int, cosines: Mapping[str, Any], kinds: Mapping[str, list[str]]) -> None:
    """One pair of domains: each kind of layer in a colour, from the first block to the last."""
    for place, (kind, names) in enumerate(kinds.items()):
        colour, offset = f"C{place % 10}", 0.7 * ((place + 0.5) / len(kinds) - 0.5)
        points = [(i + offset, cosines["layers"][name]) for i, name in enumerate(names)]
        points = [(x, layer) for x, layer in points if layer["cosine"][pair] is not None]
        values = [layer["cosine"][pair] for _, layer in points]
        axis.plot([x for x, _ in points], values, "o", markersize=3, color=colour, label=kind)
        for x, layer in points:
            if layer["low"][pair] is not None:
                axis.plot([x, x], [layer["low"][pair], layer["high"][pair]], color=colour, linewidth=1)
            if layer["ceiling"][pair] is not None:
                axis.plot(x, layer["ceiling"][pair], "_", color="0.4", markersize=4)
    longest = max(map(len, kinds.values()))
    nulls = [
        mean(cosines["layers"][names[i]]["null"] for names in kinds.values() if i < len(names)) for i in range(longest)
    ]
    bands(axis, [(-null, null) for null in nulls], fill=True, color="0.85", zorder=0)
    axis.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    if cosines["model"]["cosine"][pair] is not None:
        axis.axhline(cosines["model"]["cosine"][pair], color="black", linestyle=":", linewidth=1)
    axis.set_xticks(range(0, longest, -(-longest // 16)))


def _interference_figure(record: Mapping[str, Any]) -> Figure:
    from matplotlib.colors import CenteredNorm

    domains, places = record["domains"], range(len(record["domains"]))
    first_order = zip(record["first_order"], record["loss"], strict=True)
    percent = {
        "first order": [[100 * rise / own for rise in row] for row, own in first_order],
        "measured": [[100 * share for share in row] for row in record["relative"]],
    }
    bound = max(abs(value) for rises in percent.values() for row in rises for value in row) or 1.0
    figure, axes = new_figure(1, 2, 1.0 + 0.5 * len(domains))
    for axis, (title, rises) in zip(axes[0], percent.items(), strict=True):
        image = axis.imshow(rises, cmap="RdBu_r", norm=CenteredNorm(halfrange=bound), aspect="auto")
        for i, row in enumerate(rises):
            for j, value in enumerate(row):
                colour = "white" if abs(value) > 0.6 * bound else "black"
                axis.text(j, i, f"{value:+.2f}".replace("-", "−"), ha="center", va="center", color=colour, fontsize=9)
        axis.set_xticks(places, domains)
        axis.set_yticks(places, domains)
        label(axis, "step on", title=title)
    label(axes[0][0], y="loss of")
    bar = figure.colorbar(image, ax=list(axes[0]), shrink=0.9)
    bar.set_label("change of the loss, %", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def _table(cosines: Mapping[str, Any]) -> Table:
    whole, layers, pairs = cosines["model"], cosines["layers"].values(), _pairs(cosines)
    intervals = zip(whole["low"], whole["high"], strict=True)

    def mean_over_layers(key: str) -> list[str]:
        return [decimal(mean_of_known(layer[key][pair] for layer in layers)) for pair in range(len(pairs))]

    return Table.of_columns(
        [
            ("whole model", pairs),
            ("cosine", list(map(decimal, whole["cosine"]))),
            ("interval", ["–" if low is None else f"{low:.3f} to {high:.3f}" for low, high in intervals]),
            ("null", [f"±{whole['null']:.4f}"] * len(pairs)),
            ("ceiling", list(map(decimal, whole["ceiling"]))),
            ("corrected", list(map(decimal, whole["corrected"]))),
            ("shared inputs", mean_over_layers("overlap")),
            ("chance", mean_over_layers("overlap_null")),
        ]
    )
