"""Tables of what probes found in models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from benchmarks.arena.drift_of_methods import HEADER, steps, summary
from sparse_cl.probes.scaling import fit_exponent

from .cells import bare, number, results, table

_WIDTHS = (32, 64, 128, 256, 512)


def overlap() -> str:
    """IoU of the most active neurons of two domains."""
    found = results("probe-base-5m")["overlap"]
    at = [found["fractions"].index(share) for share in (0.05, 0.1)]

    def cell(value: float, ends: list[float]) -> str:
        return f"{value:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"

    rows = [
        [" – ".join(pair), *(cell(iou[i], interval[i]) for i in at)]
        for pair, iou, interval in zip(found["pairs"], found["mean_iou"], found["mean_interval"], strict=True)
    ]
    rows.append(["chance", *(cell(found["mean_null"][i], found["mean_null_interval"][i]) for i in at)])
    return table(("", "top 5 %", "top 10 %"), rows)


def cosines() -> str:
    """Of domains' gradients, of the whole model."""
    found = results("probe-base-5m")["cosines"]
    whole, rows = found["model"], []
    for i, pair in enumerate(found["pairs"]):
        interval = f"{whole['low'][i]:.2f} to {whole['high'][i]:.2f}"
        cells = [f"{whole['cosine'][i]:.3f}", interval, f"{whole['ceiling'][i]:.2f}", f"{whole['corrected'][i]:.3f}"]
        rows.append([" – ".join(pair), *cells])
    return table(("", "cosine", "interval", "ceiling", "corrected for noise"), rows)


def widths() -> str:
    """|cosine| and overlap by width, means over seeds."""
    models = results("scale-study")
    chance = fmean(model["overlap"]["null"] for model in models if model["family"] == "random")
    rows = []
    for measure, key in (("cosine", "absolute"), ("overlap", "iou")):
        form = ".3f" if measure == "cosine" else ".2f"
        for family in ("random", "pretrained"):
            name = f"\\|cosine\\|, {family}" if measure == "cosine" else f"overlap, {family}"
            name += f" (chance {bare(chance, '.3f')})" if name == "overlap, random" else ""
            own = [
                [m[measure][key] for m in models if (m["family"], m["width"]) == (family, width)] for width in _WIDTHS
            ]
            others = [m[measure][key] for m in models if m["family"] not in ("random", "pretrained")]
            cells = [fmean(values) for values in own] + (others if family == "pretrained" else [])
            shown = [bare(value, form) for value in cells]
            rows.append([name, *shown, *[""] * (len(_WIDTHS) + len(others) - len(shown))])
    named = [f"{m['model']}, {m['width']}" for m in models if m["family"] not in ("random", "pretrained")]
    return table(("width", *map(str, _WIDTHS), *named), rows)


MEASURES = {
    "mean \\|cosine\\| of domains' gradients": lambda model: model["cosine"]["absolute"],
    "the same, corrected for noise": lambda model: model["cosine"]["corrected"],
    "\\|cosine\\| of the whole model's gradients": lambda model: fmean(map(abs, model["whole_model"]["cosine"])),
    "overlap of the top 5 % of the neurons": lambda model: model["overlap"]["iou"],
}
"""What is set against the width, by what the docs call it."""


def exponent(family: str, measure: str) -> str:
    """Of the width, ± two standard errors."""
    own = [(model["width"], MEASURES[measure](model)) for model in results("scale-study") if model["family"] == family]
    slope, error = fit_exponent(*zip(*own, strict=True))
    return f"{number(slope, '.2f')} ± {2 * error:.2f}"


def exponents() -> str:
    """Exponents of the width, by family."""
    rows = []
    for name in MEASURES:
        conjecture = "< 0" if name.startswith("overlap") else "−0.5"
        rows.append([name, *(exponent(family, name) for family in ("random", "pretrained")), conjecture])
    return table(("", "random", "pretrained", "conjecture"), rows)


def real_models() -> str:
    """What domains share and use, of the scale study's widths and of models that are really pretrained; nulls in
    brackets."""
    models = [model for model in results("scale-study") if model["family"] == "pretrained"]
    rows = [
        _probed(f"Llama of width {width}, three seeds", [m for m in models if m["width"] == width]) for width in _WIDTHS
    ]
    rows += [_probed(_REAL.get(model["model"], model["model"]), [model]) for model in results("real-models")]
    header = ("", "parameters", "overlap of the top 5 % (chance)", "of one domain with itself")
    gradients = ("\\|cosine\\| of gradients, corrected for noise", "neurons for 99 % of a token's mass (Gaussians)")
    room = ("directions that four domains use (unrelated ones)", "dimensions of a neuron (random ones)")
    return table((*header, *gradients, *room), rows)


_REAL = {"base-5m": "the Llama of 5.5 M", "gemma-trimmed": "Gemma 3 270M", "qwen-coder-0.5b": "Qwen2.5-Coder 0.5B"}


def _probed(name: str, models: list[Mapping[str, Any]]) -> list[str]:
    """A row, means over models; what none has is left free."""

    def cell(measure: str, key: str, form: str, null: str = "") -> str:
        found = [model[measure] for model in models if model.get(measure)]
        if not found:
            return ""
        value = number(fmean(one[key] for one in found), form)
        return f"{value} ({number(fmean(one[null] for one in found), form)})" if null else value

    millions = fmean(model["parameters"] for model in models) / 1e6
    cells = [cell("overlap", "iou", ".2f", "null"), cell("overlap", "ceiling", ".2f")]
    cells += [cell("cosine", "corrected", ".2f"), cell("sparsity", "needed", ".0%", "null")]
    cells += [cell("capacity", "used", ".0%", "null"), cell("superposition", "mean", ".2f", "null")]
    return [name, f"{millions:.3g} M", *cells]


def drift_short() -> str:
    """What methods did to the base model."""
    found = results("drift-of-methods")
    rows = []
    for method, row in found["methods"].items():
        said = summary_of(method, row)
        share = f"{100 * float(said['90 % in']):.0f} %" + (" of the neurons" if method == "adamw" else "")
        rank = number(float(said["feature rank"].replace("−", "-")), ".0f")
        fit = said["steps to fit"].split()[0]
        rows.append([f"`{method}`", said["forgetting"], said["1 − CKA, text (halves)"].split()[0], rank, fit, share])
    fit = f"steps to fit a random task ({steps(found['base']['plasticity']).split()[0]} before)"
    return table(("", "forgetting", "1 − CKA", _rank_before(found), fit, "90 % of the update in"), rows)


def drift_of_methods() -> str:
    """The same with halves of the text, directions, hubs and ranks of updates."""
    found = results("drift-of-methods")
    shown = {
        "1 − CKA, text (halves)": "1 − CKA (halves of the text)",
        "span kept": "16 leading directions kept",
        "90 % in": "90 % of ‖ΔW‖² in",
        "hubs ×": "hubs' share of it over their share of neurons",
        "update rank": "effective rank of updates, over random ones'",
        "feature rank": _rank_before(found),
        "steps to fit": "steps to fit (range)",
    }
    rows = [["base", "0", "1", "", "", "", "", steps(found["base"]["plasticity"])]]
    for method, row in found["methods"].items():
        said = summary_of(method, row)
        rows.append([method, *(said[name] for name in shown)])
    return table(("", *shown.values()), rows)


def summary_of(method: str, row: Mapping[str, Any]) -> dict[str, str]:
    """Column of `drift_of_methods` → its text as the docs write numbers."""
    texts = (re.sub(r"\b0\.(?=\d\d)", ".", text).replace("-", "−") for text in summary(method, row)[1:])
    return dict(zip(HEADER[1:], texts, strict=True))


def _rank_before(found: Mapping[str, Any]) -> str:
    layers = next(iter(found["methods"].values()))["drift"]["before"]["layers"].values()
    return f"rank of hidden states ({fmean(layer['effective_rank'] for layer in layers):.0f} before)"
