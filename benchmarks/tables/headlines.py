"""Sentences of README and results.md, made of the results.

A function that says more or less of a difference fails where its sign has turned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from .cells import between, mean_of, number, results, sixteen


def _gemma() -> str:
    points = ("adamw-5e-05-given", "elastic-5e-05-given", "lora-0.0005-given", "elastic-lora-0.0005-given")
    learned, lost = (
        [number(mean_of("gemma", key, point), form) for point in points]
        for key, form in (("learned", ".3f"), ("gain_lost", ".0%"))
    )
    return (
        f"AdamW learned {learned[0]} bits per byte and lost {lost[0]} of it, `elastic` {learned[1]} and {lost[1]}; "
        f"LoRA {learned[2]} and {lost[2]}, `elastic-lora` {learned[3]} and {lost[3]}."
    )


def _gemma_kept() -> str:
    learned, lost = (
        [mean_of("gemma", key, f"{point}-given") for point in ("adamw-5e-05", "elastic-5e-05", "elastic-lora-0.0005")]
        for key in ("learned", "gain_lost")
    )
    more, kept = number(learned[1] / learned[0] - 1, ".0%"), [number(1 - share, ".0%") for share in lost]
    return (
        f"At the same rate `elastic` learns {more} more than AdamW and keeps {kept[1]} of it, where AdamW keeps "
        f"nothing: a domain that comes later finds the model better than AdamW leaves it. `elastic-lora` learns what "
        f"LoRA does and keeps {kept[2]} of it"
    )


def _at_default(key: str, orders: Sequence[str] = ("given", "reverse")) -> float:
    return mean_of("strength", key, *(f"elastic-20-{order}" for order in orders))


def _default_strength() -> str:
    """Both orders together, and each."""
    learned, acc, lost = (
        [_at_default(key), _at_default(key, ["given"]), _at_default(key, ["reverse"])]
        for key in ("learned", "acc", "gain_lost")
    )
    assert max(lost) < 0.005, "the sentence says that nothing was lost"
    return (
        f"learned {learned[0]:.2f} and ACC {acc[0]:.2f} ({learned[1]:.2f} and {acc[1]:.2f} in the given order, "
        f"{learned[2]:.2f} and {acc[2]:.2f} in the reverse one), and nothing lost in either "
        f"({number(lost[1], '.1%')} and {number(lost[2], '.1%')})"
    )


def _default_strength_short() -> str:
    assert _at_default("gain_lost") < 0.005, "the sentence says that nothing was lost"
    return f"learned {_at_default('learned'):.2f} in them, lost nothing and ended at {_at_default('acc'):.2f}."


def _sixteen_short() -> str:
    runs = sixteen()
    adamw, elastic = (runs["base-5m", method]["summary"] for method in ("adamw", "elastic"))
    lost = [number(summary["gain_lost"], ".0%") for summary in (adamw, elastic)]
    return (
        f"sixteen domains, one seed, AdamW learned {adamw['learned']:.2f} and lost {lost[0]}, `elastic` "
        f"{elastic['learned']:.2f} and {lost[1]}"
    )


def _real() -> str:
    (gemma,) = (model for model in results("real-models") if model["model"] == "gemma-trimmed")
    llamas = [model["overlap"]["iou"] for model in results("scale-study") if model["family"] == "pretrained"]
    means = [fmean(llamas[i : i + 3]) for i in range(0, len(llamas), 3)]
    overlap, cosine, mass = gemma["overlap"], gemma["cosine"], gemma["sparsity"]
    assert overlap["iou"] > max(means), "the sentence says that it is more"
    return (
        f"in Gemma 3 270M the top 5 % of the neurons overlap by {overlap['iou']:.2f} (Llamas of 0.2 M to 8 M: "
        f"{between(means, '.2f')}), gradients have \\|cosines\\| of {cosine['corrected']:.2f}, and "
        f"{number(mass['needed'], '.0%')} of the neurons carry 99 % of a token's mass "
        f"([table](../benchmarks/results/README.md#scale-study)) | chance {overlap['null']:.2f}, one domain with "
        f"itself {overlap['ceiling']:.2f}; Gaussians {number(mass['null'], '.0%')} |"
    )


SENTENCES: Mapping[str, Sequence[Callable[[], str]]] = {
    "README.md": (_gemma, _default_strength_short, _sixteen_short),
    "docs/results.md": (_gemma_kept, _default_strength, _real),
}
"""Document → its sentences."""
