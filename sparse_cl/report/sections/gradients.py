"""What a report shows of the domains' gradients: cosines, shared directions, interference."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparse_cl.four_domains.figures import by_kind
from sparse_cl.report.section import Section, Table, decimal, new_figure
from sparse_cl.report.summary import mean_of_known

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = 12
_NOTE = (
    "Mean gradients of the answer loss over the tokens of each domain. Grey band: ±1.96/√d, where 95 % of pairs of "
    "isotropic random vectors of d entries lie; real gradients have far fewer directions than entries, how many is not "
    "known, so a cosine beyond the band need not mean that domains are related. Bars: 95 % intervals of what another "
    "sample of as many tokens would show. Ceiling: √(r_A r_B), r the split-half reliability, what two samples of one "
    "domain would show; corrected: cosine / ceiling. Shared input directions: ‖UᵀV‖²/k of the {rank} leading right "
    "singular vectors, chance k/n. Interference: a step of {step:.2g} of the weights' norm down the gradient of the "
    "domain below, and what it adds to the loss of the domain at the left: first order −η g_A·g_B/‖g_B‖, and measured."
)


def section(cosines: Mapping[str, Any], interference: Mapping[str, Any] | None = None) -> Section:
    """From `GradientComparison.to_json()` and `Interference.to_json()`."""
    figures = [_cosine_figure(cosines)]
    note = _NOTE
    if interference is None:
        note = note[: note.index(" Interference:")]
        note = note.format(rank=cosines["rank"])
    else:
        figures.append(_interference_figure(interference))
        note = note.format(rank=cosines["rank"], step=interference["relative_step"])
    sentences = [_sentence(cosines)] + ([_interference_sentence(interference)] if interference else [])
    sentence = " ".join(filter(None, sentences))
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
        interval = "" if whole["low"][i] is None else f" [{whole['low'][i]:.2f}, {whole['high'][i]:.2f}]"
        ceiling = "" if whole["ceiling"][i] is None else f", ceiling {whole['ceiling'][i]:.2f}"
        return f"{whole['cosine'][i]:.2f}{interval} between {a} and {b} (null ±{whole['null']:.1g}{ceiling})"

    text = f"The cosine of the whole model's gradients is {told(closest)}"
    if closest != farthest:
        text = f"{text}, the largest of {len(known)} pairs, and {told(farthest)}, the smallest"
    layers = [
        (value, layer["null"]) for layer in cosines["layers"].values() for value in layer["cosine"] if value is not None
    ]
    outside = sum(abs(value) > null for value, null in layers)
    times = mean(abs(value) / null for value, null in layers)
    verdict = (
        "so domains do not share directions more than isotropic gradients do"
        if outside <= 0.1 * len(layers)
        else "so the layers' gradients are not independent random directions"
    )
    text += (
        f". By layer, {outside} of {len(layers)} cosines lie outside the isotropic null (mean |cosine| "
        f"{mean(abs(value) for value, _ in layers):.2f}, {times:.1f} times its bound), {verdict}"
    )
    shared = [
        (value, null)
        for layer in cosines["layers"].values()
        for value, null in zip(layer["overlap"], layer["overlap_null"], strict=True)
        if value is not None
    ]
    if shared:
        text += (
            f"; {mean(value for value, _ in shared):.2f} of their leading input directions are shared "
            f"(chance {mean(null for _, null in shared):.2f})"
        )
    return text + "."


def _interference_sentence(record: Mapping[str, Any]) -> str:
    domains = record["domains"]
    relative = record["relative"]
    count = len(domains)
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
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = new_figure(rows, columns, height=2.6)
    kinds = by_kind(list(cosines["layers"]))
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for number, (axis, name) in enumerate(zip(axes.flat, names, strict=False)):
        for place, (kind, layers) in enumerate(kinds.items()):
            offset = 0.7 * ((place + 0.5) / len(kinds) - 0.5)
            points = [(i + offset, cosines["layers"][layer]) for i, layer in enumerate(layers)]
            points = [(x, layer) for x, layer in points if layer["cosine"][number] is not None]
            xs, values = [x for x, _ in points], [layer["cosine"][number] for _, layer in points]
            axis.plot(xs, values, "o", markersize=3, color=f"C{place % 10}", label=kind)
            for x, layer in points:
                if layer["low"][number] is not None:
                    axis.plot(
                        [x, x], [layer["low"][number], layer["high"][number]], color=f"C{place % 10}", linewidth=1
                    )
                if layer["ceiling"][number] is not None:
                    axis.plot(x, layer["ceiling"][number], "_", color="0.4", markersize=4)
        longest = max(map(len, kinds.values()))
        edges = [i - 0.5 for i in range(longest + 1)]
        nulls = [
            mean(cosines["layers"][layers[i]]["null"] for layers in kinds.values() if i < len(layers))
            for i in range(longest)
        ]
        axis.stairs(nulls, edges, baseline=[-null for null in nulls], fill=True, color="0.85", zorder=0)
        axis.axhline(0, color="0.6", linewidth=0.6, zorder=0)
        if cosines["model"]["cosine"][number] is not None:
            axis.axhline(cosines["model"]["cosine"][number], color="black", linestyle=":", linewidth=1)
        axis.set_title(name, fontsize=9)
        axis.set_xticks(range(0, longest, -(-longest // 16)))
        axis.tick_params(labelsize=8)
        axis.set_xlabel("block", fontsize=8)
    limits = [axis.get_ylim() for axis in axes.flat[: len(names)]]
    for axis in axes.flat[: len(names)]:
        axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    axes[0][0].set_ylabel("cosine", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(7, len(labels)), fontsize=8)
    hidden = len(cosines["pairs"]) - len(names)
    more = f"; {hidden} more pairs are in the table" if hidden else ""
    figure.supxlabel(
        f"dot: a layer, with its interval; dash: ceiling; grey band: isotropic null; dotted: whole model{more}",
        fontsize=8,
    )
    return figure


def _interference_figure(record: Mapping[str, Any]) -> Figure:
    from matplotlib.colors import CenteredNorm

    domains = record["domains"]
    percent = {
        "first order": [
            [100 * v / own for v in row] for row, own in zip(record["first_order"], record["loss"], strict=True)
        ],
        "measured": [[100 * v for v in row] for row in record["relative"]],
    }
    bound = max(abs(value) for table in percent.values() for row in table for value in row) or 1.0
    figure, axes = new_figure(1, 2, height=1.0 + 0.5 * len(domains))
    for axis, (title, table) in zip(axes[0], percent.items(), strict=True):
        image = axis.imshow(table, cmap="RdBu_r", norm=CenteredNorm(halfrange=bound), aspect="auto")
        for i, row in enumerate(table):
            for j, value in enumerate(row):
                colour = "white" if abs(value) > 0.6 * bound else "black"
                axis.text(j, i, f"{value:+.2f}".replace("-", "−"), ha="center", va="center", color=colour, fontsize=9)
        axis.set_xticks(range(len(domains)), domains, fontsize=8)
        axis.set_yticks(range(len(domains)), domains, fontsize=8)
        axis.set_xlabel("step on", fontsize=8)
        axis.set_title(title, fontsize=9)
    axes[0][0].set_ylabel("loss of", fontsize=8)
    bar = figure.colorbar(image, ax=list(axes[0]), shrink=0.9)
    bar.set_label("change of the loss, %", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def _table(cosines: Mapping[str, Any]) -> Table:
    header = ("whole model", "cosine", "interval", "null", "ceiling", "corrected", "shared inputs", "chance")
    whole, rows = cosines["model"], []
    for number, name in enumerate(_pairs(cosines)):
        low, high = whole["low"][number], whole["high"][number]
        layers = cosines["layers"].values()
        shared = [[layer[key][number] for layer in layers] for key in ("overlap", "overlap_null")]
        rows.append(
            (
                name,
                decimal(whole["cosine"][number]),
                "–" if low is None else f"{low:.3f} to {high:.3f}",
                f"±{whole['null']:.4f}",
                decimal(whole["ceiling"][number]),
                decimal(whole["corrected"][number]),
                *(decimal(mean_of_known(values)) for values in shared),
            )
        )
    return Table(header, tuple(rows))
