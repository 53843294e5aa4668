"""What a report shows of activation sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparse_cl.report.section import Section, Table, within

from .drawing import bars, beside, label, label_layers, legend_above, new_figure

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
    sentence, figures, note = _sentence(domains), [_curves(domains), _needed(domains)], _NOTE
    if critical:
        sentence += " " + _critical_sentence(critical)
        figures.append(_critical(critical))
        note += _CRITICAL
    return Section("Activation sparsity", sentence, tuple(figures), _table(domains), note)


def _sentence(domains: Mapping[str, Mapping[str, Any]]) -> str:
    needed = {name: one["mean"]["product"]["needed"] for name, one in domains.items()}
    most, nearly = ([each[level]["mean"] for each in needed.values()] for level in ("0.99", "0.9"))
    chance = _chance(domains)["product"]["needed"]["0.99"]
    average = mean(most)
    span = f", {min(most):.1%} to {max(most):.1%} in its domains" if len(domains) > 1 else ""
    return (
        f"On average {average:.1%} of the neurons carry 99% of a token's L1 mass{span}, and {mean(nearly):.1%} carry "
        f"90%; activations at random need {chance:.1%} for 99%, so the model's are "
        f"{'sparser' if average < chance else 'no sparser'}. The claim 'below {CLAIM:.0%}' {_verdict(most)}."
    )


def _critical_sentence(critical: Mapping[str, Mapping[str, Any]]) -> str:
    rise = next(iter(critical.values()))["increase"]
    shares = []
    for name, one in critical.items():
        unharmed = "" if any(at > one["share"] for at, _ in one["curve"]) else ", which is all that was tried"
        shares.append(f"{one['share']:.1%}{within(one['interval'], '.1%')} in {name}{unharmed}")
    active = [1 - one["share"] for one in critical.values()]
    return (
        f"The loss rises by no more than {rise:.0%} with so many of each token's neurons dropped: {'; '.join(shares)}. "
        f"By this measure at most {max(active):.1%} are active, and the claim {_verdict(active)}."
    )


def _verdict(active: Sequence[float]) -> str:
    """What the domains' shares of active neurons say of the claim."""
    if max(active) < CLAIM:
        return "holds"
    return "holds in some domains only" if min(active) < CLAIM else "does not hold"


def _chance(domains: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    return next(iter(domains.values()))["chance"]


def _parts(domains: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [part for part in ("gate", "up", "product") if part in _chance(domains)]


def _curves(domains: Mapping[str, Mapping[str, Any]]) -> Figure:
    from matplotlib import colormaps

    parts, records = _parts(domains), list(domains.values())
    figure, axes = new_figure(1, len(parts), 3.2)
    shares, layers = records[0]["shares"], records[0]["layers"]
    for axis, part in zip(axes[0], parts, strict=True):
        for number, layer in enumerate(layers):
            if part not in layer["parts"]:
                continue
            curves = [one["layers"][number]["parts"][part]["curve"] for one in records]
            colour = colormaps["viridis"](number / max(1, len(layers) - 1))
            called = {0: "first layer", len(layers) - 1: "last layer"}.get(number)
            axis.plot(shares, [mean(points) for points in zip(*curves, strict=True)], color=colour, label=called)
        axis.plot(shares, _chance(domains)[part]["curve"], "--", color="black", label="chance")
        axis.plot([0, 1], [0, 1], ":", color="grey", label="all equal")
        axis.axvline(CLAIM, color="0.8", linewidth=1)
        axis.set(xlim=(0, 1), ylim=(0, 1.02))
        label(axis, "share of the neurons, most active first", title=part)
    label(axes[0][0], y="share of a token's L1 mass")
    axes[0][0].legend(fontsize=8, loc="lower right")
    return figure


def _needed(domains: Mapping[str, Mapping[str, Any]]) -> Figure:
    parts = _parts(domains)
    figure, axes = new_figure(1, len(parts))
    for axis, part in zip(axes[0], parts, strict=True):
        for number, (name, one) in enumerate(domains.items()):
            layers = [layer for layer in one["layers"] if part in layer["parts"]]
            found = [layer["parts"][part]["needed"]["0.99"] for layer in layers]
            means = [each["mean"] for each in found]
            places = beside(number, len(domains), len(layers), 0.08)
            lengths = bars(means, [each["interval"] for each in found])
            axis.errorbar(places, means, yerr=lengths, marker="o", markersize=3, label=name)
        axis.axhline(_chance(domains)[part]["needed"]["0.99"], linestyle="--", color="black", label="chance")
        axis.axhline(CLAIM, linestyle="-", color="0.8", label=f"claim: {CLAIM:.0%}")
        label_layers(axis, [layer["name"] for layer in layers])
        label(axis, title=part)
        axis.set_ylim(0, 1.02)
    label(axes[0][0], y="share of neurons with 99%\nof a token's L1 mass")
    legend_above(figure, axes[0][0], most=6)
    return figure


def _critical(critical: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure, ((axis,),) = new_figure(height=2.8)
    for name, one in critical.items():
        shares, losses = zip(*one["curve"], strict=True)
        axis.plot(shares, [loss / one["base"] for loss in losses], marker="o", markersize=3, label=name)
    rise = next(iter(critical.values()))["increase"]
    axis.axhline(1 + rise, linestyle="--", color="black", label=f"{rise:.0%} above")
    label(axis, "share of each token's neurons that is dropped", "answer loss over that without dropping")
    axis.legend(fontsize=8)
    return figure


def _table(domains: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = [
        ("domain", [*domains, "chance", "ceiling"]),
        ("tokens", [*(f"{one['tokens']:,}" for one in domains.values()), "", ""]),
    ]
    for part in _parts(domains):
        for level in ("0.9", "0.99"):
            found = [one["mean"][part]["needed"][level] for one in domains.values()]
            cells = [f"{each['mean']:.1%}{within(each['interval'], '.1%')}" for each in found]
            chance = _chance(domains)[part]["needed"][level]
            columns.append((f"{part}, {float(level):.0%}", [*cells, f"{chance:.1%}", f"{float(level):.1%}"]))
    return Table.of_columns(columns)
