"""What a report shows of several models: overlap, gradient cosine and sparsity against width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparse_cl.probes.scaling import fit_exponent
from sparse_cl.report.section import Section, Table, decimal, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONJECTURE = -0.5
"""The exponent that |cosine| would have if gradients were random directions among as many as the width."""

_HALF = f"{CONJECTURE:g}".replace("-", "−")

_NOTE = (
    "Means over pairs of domains and over layers; a dot is a model, a dash its ceiling (two halves or samples of one "
    "domain), a line the fitted power of the width, dashed grey the null: K/(2d − K) for the overlap of random "
    "neurons, √(2/πd) for the |cosine| of isotropic gradients of d entries (which falls as 1/width, as d grows as "
    "width²), Gaussian activations for sparsity. Noise shrinks a cosine, and gradients are noisier in some models than "
    "in others: the corrected cosine is cosine/√(r_A r_B), r the split-half reliability, where r is above 0.2. "
    "Exponents are least squares on logarithms, ± 2 standard errors, which know of the scatter between the models "
    "alone. Models of one family are fitted together; where they differ in more than width, the exponent is not of "
    "width alone."
)
_MEASURES = (
    ("overlap", "iou", "overlap of the top {share:.0%} neurons (IoU)"),
    ("cosine", "absolute", "mean |cosine| of gradients"),
    ("cosine", "corrected", "mean |cosine|, corrected for noise"),
    ("sparsity", "needed", "share of neurons for 99 % of L1 mass"),
)


def section(models: Sequence[Mapping[str, Any]]) -> Section:
    """From one `summary` a model. A `family` of at least three models and two widths gets fits.

    Raises:
        ValueError: no model.
    """
    if not models:
        raise ValueError("models: expected at least one summary, got none")
    fits = {(kind, key): _fits(models, kind, key) for kind, key, _ in _MEASURES}
    return Section(
        "Scale: what width changes", _sentence(models, fits), (_figure(models, fits),), _table(models), _NOTE
    )


def _values(models: Sequence[Mapping[str, Any]], kind: str, key: str) -> list[tuple[int, float]]:
    """(width, value) of the models that have one to draw on a logarithmic axis."""
    pairs = [(model["width"], (model[kind] or {}).get(key)) for model in models]
    return [(width, value) for width, value in pairs if value is not None and value > 0]


def _families(models: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    families: dict[str, list[Mapping[str, Any]]] = {}
    for model in models:
        families.setdefault(model["family"], []).append(model)
    return families


def _fits(models: Sequence[Mapping[str, Any]], kind: str, key: str) -> dict[str, tuple[float, float]]:
    """Exponent and standard error of each family that can be fitted."""
    fits = {}
    for family, members in _families(models).items():
        values = _values(members, kind, key)
        if len(values) >= 3 and len({width for width, _ in values}) >= 2:
            fits[family] = fit_exponent(*zip(*values, strict=True))
    return fits


def _verdict(exponent: float, error: float) -> str:
    """How an exponent stands to no change and to the conjecture."""
    low, high = exponent - 2 * error, exponent + 2 * error
    if low <= 0 <= high:
        return f"no change with width is sure, and {_HALF} is {'not ' if low <= CONJECTURE else ''}excluded"
    if low > 0:
        return "a rise with width, against the conjecture"
    if low <= CONJECTURE <= high:
        return f"in agreement with {_HALF}"
    return f"a {'slower' if low > CONJECTURE else 'faster'} fall than {_HALF}"


def _sentence(models: Sequence[Mapping[str, Any]], fits: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    widths = sorted({model["width"] for model in models})
    parts = []
    for family, (exponent, error) in fits["cosine", "absolute"].items():
        text = f"the mean |cosine| of {family} goes as width^{_power(exponent, error)}: {_verdict(exponent, error)}"
        if corrected := fits["cosine", "corrected"].get(family):
            text += f" (corrected for noise {_power(*corrected)}: {_verdict(*corrected)})"
        parts.append(text)
    for family, (exponent, error) in fits["overlap", "iou"].items():
        parts.append(f"the overlap of {family} goes as width^{_power(exponent, error)}")
    above = [model for model in models if model["cosine"] and model["cosine"]["absolute"] and model["cosine"]["null"]]
    if above:
        times = [model["cosine"]["absolute"] / model["cosine"]["null"] for model in above]
        parts.append(f"|cosine| is {_range(times)} times that of isotropic gradients")
    overlaps = [model["overlap"] for model in models if model["overlap"]]
    if overlaps:
        times = [one["iou"] / one["null"] for one in overlaps]
        parts.append(f"overlap is {_range(times)} times that of random neurons")
    span = f"from width {widths[0]} to {widths[-1]}" if len(widths) > 1 else f"at width {widths[0]}"
    if not fits["cosine", "absolute"]:
        parts.append("too few models of one family differ in width for an exponent to be fitted")
    return f"Of {len(models)} model{'s' if len(models) > 1 else ''} {span}: " + "; ".join(parts) + "."


def _power(exponent: float, error: float) -> str:
    return f"{round(exponent, 2) + 0.0:+.2f} ± {2 * error:.2f}".replace("-", "−")


def _range(values: Sequence[float]) -> str:
    low, high = (f"{value:.2g}" if value < 100 else f"{value:.0f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _figure(
    models: Sequence[Mapping[str, Any]], fits: Mapping[tuple[str, str], Mapping[str, tuple[float, float]]]
) -> Figure:
    figure, axes = new_figure(2, 2, height=3.7)
    families = _families(models)
    colours = {family: f"C{number}" for number, family in enumerate(families)}
    share = next((model["overlap"]["share"] for model in models if model["overlap"]), 0.05)
    for axis, (kind, key, label) in zip(axes.flat, _MEASURES, strict=True):
        for family, members in families.items():
            values = _values(members, kind, key)
            if not values:
                continue
            fit = fits[kind, key].get(family)
            marker = "o" if fit else "*"
            name = f"{family}: width^{_power(*fit)}" if fit else family
            size = 5 if fit else 10
            axis.plot(*zip(*values, strict=True), marker, color=colours[family], markersize=size, alpha=0.7, label=name)
            ceilings = _values(members, kind, "ceiling") if key != "corrected" else []
            if ceilings:
                axis.plot(*zip(*ceilings, strict=True), "_", color=colours[family], markersize=9)
            if fit:
                _draw_power(axis, values, fit[0], colours[family])
        nulls = sorted({(width, value) for width, value in _values(models, kind, "null")})
        if kind == "cosine" and fits[kind, key]:
            _draw_conjecture(axis, _values(families[next(iter(fits[kind, key]))], kind, key))
        by_width = {width: mean(v for w, v in nulls if w == width) for width, _ in nulls}
        if by_width and key != "corrected":
            axis.plot(list(by_width), list(by_width.values()), "--", color="grey", label="null", marker="_")
        axis.set_xscale("log")
        axis.set_yscale("log")
        widths = sorted({model["width"] for model in models})
        axis.set_xticks(widths, [str(width) for width in widths])
        axis.minorticks_off()
        _plain_ticks(axis)
        axis.set_xlabel("width", fontsize=8)
        axis.set_title(label.format(share=share), fontsize=9)
        axis.tick_params(labelsize=8)
        if axis.get_legend_handles_labels()[0]:
            # Below, since above and beneath the dots there are ceilings and nulls.
            axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return figure


def _plain_ticks(axis: Any) -> None:
    """1, 2 and 5 times powers of ten that lie on the axis, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_power(axis: Any, values: Sequence[tuple[int, float]], exponent: float, colour: str) -> None:
    """The fitted line, which passes through the mean of the logarithms."""
    import numpy as np

    widths, heights = np.log(np.array(values, dtype=float)).T
    ends = np.array([widths.min(), widths.max()])
    axis.plot(np.exp(ends), np.exp(heights.mean() + exponent * (ends - widths.mean())), color=colour, linewidth=1.2)


def _draw_conjecture(axis: Any, values: Sequence[tuple[int, float]]) -> None:
    """From the mean at the least width, the fall that is conjectured."""
    first, last = min(values)[0], max(values)[0]
    start = mean(value for width, value in values if width == first)
    ends = [start, start * (last / first) ** CONJECTURE]
    axis.plot(
        [first, last],
        ends,
        ":",
        color="black",
        linewidth=1,
        label=f"conjecture: width^{CONJECTURE:g}".replace("-", "−"),
    )


def _table(models: Sequence[Mapping[str, Any]]) -> Table:
    header: tuple[str, ...] = ("model", "width", "parameters", "overlap", "null", "ceiling")
    header += ("|cosine|", "cosine", "null", "ceiling", "corrected", "neurons for 99 %", "null")
    rows = []
    for model in models:
        overlap, cosine, sparsity = (model[kind] or {} for kind in ("overlap", "cosine", "sparsity"))
        values = [overlap.get(key) for key in ("iou", "null", "ceiling")]
        values += [cosine.get(key) for key in ("absolute", "mean", "null", "ceiling", "corrected")]
        values += [sparsity.get(key) for key in ("needed", "null")]
        size = f"{model['parameters'] / 1e6:.2f} M"
        rows.append((model["model"], str(model["width"]), size, *map(decimal, values)))
    return Table(header, tuple(rows))
