"""What a report shows of activation sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparse_cl.report.section import Section, Table, new_figure

from .layer_axis import label_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIM = 0.05
"""The claim that is looked at: a token uses less than this share of the neurons."""

_NOTE = (
    "A neuron's activation is what enters the layer out of the neurons; in a gated MLP that is gate (after its "
    "non-linearity) times up. SiLU and GELU have no exact zeros, so active are the fewest neurons that hold 99% (or "
    "90%) of the sum of a token's |activation|; mean over tokens, and over layers. Chance: independent Gaussians, and "
    "for the product of a gated MLP products of two. Ceiling: neurons that are all equally active need 99% (dotted "
    "line). Intervals: 95%, sequences resampled."
)
_CRITICAL = (
    " Critical sparsity: in every MLP at once, the same share of each token's neurons, those with the smallest "
    "|activation|, is set to zero; the largest share that bisection found with a rise of the answer loss within the "
    "limit. A model that knows nothing of a domain has nothing to lose there."
)


def section(domains: Mapping[str, Mapping[str, Any]], critical: Mapping[str, Any] | None = None) -> Section:
    """From `ActivationScores.to_json()`, and `CriticalSparsity.to_json()` where it was measured, of each domain."""
    figures = [_curves(domains), _needed(domains)]
    if critical:
        figures.append(_critical(critical))
    return Section(
        "Activation sparsity",
        _sentence(domains, critical),
        tuple(figures),
        _table(domains),
        _NOTE + (_CRITICAL if critical else ""),
    )


def _sentence(domains: Mapping[str, Mapping[str, Any]], critical: Mapping[str, Any] | None) -> str:
    needed = {name: one["mean"]["product"]["needed"] for name, one in domains.items()}
    values = {level: [each[level]["mean"] for each in needed.values()] for level in ("0.9", "0.99")}
    chance = next(iter(domains.values()))["chance"]["product"]["needed"]["0.99"]
    average = mean(values["0.99"])
    span = f", {min(values['0.99']):.1%} to {max(values['0.99']):.1%} in its domains" if len(domains) > 1 else ""
    text = (
        f"On average {average:.1%} of the neurons carry 99% of a token's L1 mass{span}, and "
        f"{mean(values['0.9']):.1%} carry 90%; activations at random need {chance:.1%} for 99%, so the model's are "
        + ("sparser. " if average < chance else "no sparser. ")
    )
    if max(values["0.99"]) < CLAIM:
        text += f"The claim 'below {CLAIM:.0%}' holds."
    elif min(values["0.99"]) < CLAIM:
        text += f"The claim 'below {CLAIM:.0%}' holds in some domains only."
    else:
        text += f"The claim 'below {CLAIM:.0%}' does not hold."
    if critical:
        text += " " + _critical_sentence(critical)
    return text


def _critical_sentence(critical: Mapping[str, Mapping[str, Any]]) -> str:
    rise = next(iter(critical.values()))["increase"]
    shares = []
    for name, one in critical.items():
        interval = one["interval"]
        within = f" [{interval[0]:.1%}, {interval[1]:.1%}]" if interval else ""
        unharmed = "" if any(at > one["share"] for at, _ in one["curve"]) else ", which is all that was tried"
        shares.append(f"{one['share']:.1%}{within} in {name}{unharmed}")
    active = [1 - one["share"] for one in critical.values()]
    verdict = (
        "does not hold" if min(active) >= CLAIM else "holds" if max(active) < CLAIM else "holds in some domains only"
    )
    return (
        f"The loss rises by no more than {rise:.0%} with so many of each token's neurons dropped: {'; '.join(shares)}. "
        f"By this measure at most {max(active):.1%} are active, and the claim {verdict}."
    )


def _parts(domains: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = next(iter(domains.values()))["mean"]
    return [part for part in ("gate", "up", "product") if part in found]


def _curves(domains: Mapping[str, Mapping[str, Any]]) -> Figure:
    from matplotlib import colormaps

    parts = _parts(domains)
    figure, axes = new_figure(1, len(parts), height=3.2, width=None if len(parts) > 1 else 5.0)
    records = list(domains.values())
    shares, layers = records[0]["shares"], records[0]["layers"]
    for axis, part in zip(axes[0], parts, strict=True):
        for number, layer in enumerate(layers):
            if part not in layer["parts"]:
                continue
            curves = [one["layers"][number]["parts"][part]["curve"] for one in records]
            colour = colormaps["viridis"](number / max(1, len(layers) - 1))
            label = {0: "first layer", len(layers) - 1: "last layer"}.get(number)
            axis.plot(shares, [mean(points) for points in zip(*curves, strict=True)], color=colour, label=label)
        axis.plot(shares, records[0]["chance"][part]["curve"], "--", color="black", label="chance")
        axis.plot([0, 1], [0, 1], ":", color="grey", label="all equal")
        axis.axvline(CLAIM, color="0.8", linewidth=1)
        axis.set_title(part, fontsize=9)
        axis.set_xlabel("share of the neurons, most active first", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1.02)
    axes[0][0].set_ylabel("share of a token's L1 mass", fontsize=8)
    axes[0][0].legend(fontsize=8, loc="lower right")
    return figure


def _needed(domains: Mapping[str, Mapping[str, Any]]) -> Figure:
    parts = _parts(domains)
    figure, axes = new_figure(1, len(parts), height=3.0, width=None if len(parts) > 1 else 5.0)
    for axis, part in zip(axes[0], parts, strict=True):
        for number, (name, one) in enumerate(domains.items()):
            layers = [layer for layer in one["layers"] if part in layer["parts"]]
            found = [layer["parts"][part]["needed"]["0.99"] for layer in layers]
            axis.errorbar(
                [place + 0.08 * (number - (len(domains) - 1) / 2) for place in range(len(layers))],
                [each["mean"] for each in found],
                yerr=_bars([each["mean"] for each in found], [each["interval"] for each in found]),
                marker="o",
                markersize=3,
                label=name,
            )
        chance = next(iter(domains.values()))["chance"][part]["needed"]["0.99"]
        axis.axhline(chance, linestyle="--", color="black", label="chance")
        axis.axhline(CLAIM, linestyle="-", color="0.8", label=f"claim: {CLAIM:.0%}")
        label_layers(axis, [layer["name"] for layer in layers])
        axis.set_title(part, fontsize=9)
        axis.set_ylim(0, 1.02)
    axes[0][0].set_ylabel("share of neurons with 99%\nof a token's L1 mass", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)), fontsize=8)
    return figure


def _bars(means: Sequence[float], intervals: Sequence[Sequence[float] | None]) -> list[list[float]] | None:
    known = [interval for interval in intervals if interval is not None]
    if len(known) < len(intervals):
        return None
    # A reflected interval need not hold its estimate; an error bar must.
    return [
        [max(0.0, m - low) for m, (low, _) in zip(means, known, strict=True)],
        [max(0.0, high - m) for m, (_, high) in zip(means, known, strict=True)],
    ]


def _critical(critical: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure, ((axis,),) = new_figure(1, 1, width=5.0, height=2.8)
    for name, one in critical.items():
        shares, losses = zip(*one["curve"], strict=True)
        axis.plot(shares, [loss / one["base"] for loss in losses], marker="o", markersize=3, label=name)
    rise = next(iter(critical.values()))["increase"]
    axis.axhline(1 + rise, linestyle="--", color="black", label=f"{rise:.0%} above")
    axis.set_xlabel("share of each token's neurons that is dropped", fontsize=8)
    axis.set_ylabel("answer loss over that without dropping", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8)
    return figure


def _table(domains: Mapping[str, Mapping[str, Any]]) -> Table:
    parts = _parts(domains)
    header = ("domain", "tokens", *(f"{part}, {level:.0%}" for part in parts for level in (0.9, 0.99)))
    rows = [
        (
            name,
            f"{one['tokens']:,}",
            *(_cell(one["mean"][part]["needed"][level]) for part in parts for level in ("0.9", "0.99")),
        )
        for name, one in domains.items()
    ]
    chance = next(iter(domains.values()))["chance"]
    rows.append(
        ("chance", "", *(f"{chance[part]['needed'][level]:.1%}" for part in parts for level in ("0.9", "0.99")))
    )
    rows.append(("ceiling", "", *(f"{level:.1%}" for _ in parts for level in (0.9, 0.99))))
    return Table(header, tuple(rows))


def _cell(found: Mapping[str, Any]) -> str:
    if found["interval"] is None:
        return f"{found['mean']:.1%}"
    low, high = found["interval"]
    return f"{found['mean']:.1%} [{low:.1%}, {high:.1%}]"
