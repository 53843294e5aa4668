"""The table of conjectures: what probes found of each, beside what chance would give."""

from __future__ import annotations

from statistics import fmean

from .cells import between, number, results, table
from .models import MEASURES, exponent, summary_of


def conjectures() -> str:
    """A row each."""
    rows = [_sparse(), _apart(), _orthogonal(), _hurt(), _width(), _real(), *_landed(), _room()]
    return table(("conjecture", "what was seen", "compare with"), rows)


def _sparse() -> list[str]:
    found = results("probe-base-5m")
    domains, masses = found["activation"].values(), ("0.99", "0.9")
    means = [fmean(seen["mean"]["product"]["needed"][mass]["mean"] for seen in domains) for mass in masses]
    nulls = [fmean(seen["chance"]["product"]["needed"][mass] for seen in domains) for mass in masses]
    needed, chance = ([number(share, ".0%") for share in shares] for shares in (means, nulls))
    known = {domain: seen for domain, seen in found["critical_sparsity"].items() if domain != "code"}
    enough = between((1 - seen["share"] for seen in known.values()), ".0%")
    return [
        "each token uses less than 5 % of the neurons",
        f"**no**: {needed[0]} carry 99 % of the mass, {needed[1]} carry 90 %; {enough} suffice for a loss within 1 % "
        "(not on code, of which the model knows nothing)",
        f"{chance[0]} and {chance[1]} if activations were random",
    ]


def _apart() -> list[str]:
    found = results("probe-base-5m")["overlap"]
    at = found["fractions"].index(0.05)
    pairs = dict(zip(map(tuple, found["pairs"]), found["mean_iou"], strict=True))
    itself = fmean(value for pair in found["ceiling"] for value in pair[at])
    return [
        "domains use neurons of their own",
        f"**in part**: the top 5 % overlap by {number(fmean(iou[at] for iou in pairs.values()), '.2f')}, code and "
        f"medical by {number(pairs['code', 'medical'][at], '.2f')}",
        f"chance {number(found['mean_null'][at], '.3f')}, one domain with itself {number(itself, '.2f')}",
    ]


def _orthogonal() -> list[str]:
    whole = results("probe-base-5m")["cosines"]["model"]
    itself = between(whole["reliability"].values(), ".2f")
    return [
        "gradients of domains are nearly orthogonal",
        f"**no**: cosines {between(whole['cosine'], '.2f')}",
        f"isotropic ±{whole['null']:.4f}, one domain with itself {itself}",
    ]


def _hurt() -> list[str]:
    moved = results("probe-base-5m")["interference"]["relative"]
    others = [loss for i, row in enumerate(moved) for j, loss in enumerate(row) if i != j]
    rose = sum(loss > 0 for loss in others)
    assert not rose, "the row says that none rose"
    return ["a step on one domain hurts another", f"**not at first**: {rose} of {len(others)} losses rise", ""]


def _width() -> list[str]:
    (layer, whole), (random, random_whole) = (
        [exponent(family, measure) for measure in MEASURES if "cosine" in measure]
        for family in ("pretrained", "random")
    )
    return [
        "gradients get more orthogonal with width, as width^−1/2",
        f"**no**: layer by layer as width^({layer}), for the whole model as width^({whole}), widths 32 to 512 "
        "([scale study](../benchmarks/results/README.md#scale-study))",
        f"random weights: {random}, {random_whole}",
    ]


def _real() -> list[str]:
    gemma, qwen = (
        next(model for model in results("real-models") if model["model"] == name)
        for name in ("gemma-trimmed", "qwen-coder-0.5b")
    )
    llamas = [model["overlap"]["iou"] for model in results("scale-study") if model["family"] == "pretrained"]
    means = [fmean(llamas[i : i + 3]) for i in range(0, len(llamas), 3)]
    iou, null, own = ([number(m["overlap"][key], ".2f") for m in (gemma, qwen)] for key in ("iou", "null", "ceiling"))
    needed, even = ([number(m["sparsity"][key], ".0%") for m in (gemma, qwen)] for key in ("needed", "null"))
    assert qwen["overlap"]["iou"] > 10 * qwen["overlap"]["null"], "the row says no"
    assert null[0] == null[1] and even[0] == even[1], "the row says them once"
    return [
        "domains lie apart where a model is really pretrained",
        f"**no**: in Gemma 3 270M and Qwen2.5-Coder 0.5B the top 5 % of the neurons overlap by {' and '.join(iou)} "
        f"(Llamas of 0.2 M to 8 M: {between(means, '.2f')}), and {' and '.join(needed)} of the neurons carry 99 % of a "
        f"token's mass; Gemma's gradients have \\|cosines\\| of {number(gemma['cosine']['corrected'], '.2f')} "
        "([table](../benchmarks/results/README.md#scale-study))",
        f"chance {null[0]}, one domain with itself {' and '.join(own)}; Gaussians {even[0]}",
    ]


def _landed() -> list[list[str]]:
    said = summary_of("adamw", results("drift-of-methods")["methods"]["adamw"])
    share = number(float(said["90 % in"]), ".0%")
    return [
        [
            "AdamW's update gathers on hub neurons, which all domains use",
            f"**no**: hubs get {number(float(said['hubs ×']), '.2f')} of their share",
            "1",
        ],
        [
            "AdamW smears its update",
            f"**yes**: 90 % of it lies in {share} of the neurons",
            "90 % if spread evenly",
        ],
    ]


def room() -> tuple[float, float]:
    """Share of the directions that four domains use, mean over layers, and that unrelated ones would."""
    layers = results("probe-base-5m")["capacity"]["layers"].values()
    used, null = (fmean(layer[key][-1] / layer["width"] for layer in layers) for key in ("used", "used_null"))
    return used, null


def _room() -> list[str]:
    used, null = room()
    return [
        "there is room for four domains",
        f"**yes, not for many**: they use {number(used, '.0%')} of the directions",
        f"{number(null, '.0%')} if unrelated",
    ]
