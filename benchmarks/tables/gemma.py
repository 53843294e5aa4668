"""Sentences of README and results.md on Gemma 3 270M, made of the study `gemma`."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from benchmarks.arena.grid import best_points
from sparse_cl.four_domains.settings import GIVEN, REVERSE

from .cells import CALLED, harder, named, number, results

_OTHERS = {"sfa": "SFA", "l2-sp": "L2-SP", "self-replay": "self-replay", "replay-5": "replay of 5 %"}
"""Baselines on Gemma, beside those that the first sentence has → what the docs call them."""


def _best(method: str) -> str:
    """The point of a method on Gemma, code first, at the rate that ends lowest with the first seed."""
    return f"{best_points('gemma')[method]}-{GIVEN}"


def _scores(*points: str) -> tuple[list[float], list[float]]:
    """What points learned, and the shares that they lost, over the seeds that all of them have."""
    runs = _shared(*points)
    learned, lost = ([fmean(run["summary"][key] for run in own) for own in runs] for key in ("learned", "gain_lost"))
    return learned, lost


def _shared(*points: str) -> list[list[Any]]:
    """The runs of each point on Gemma with the seeds that all of them have."""
    runs = [{run["seed"]: run for run in results("arena/gemma")["runs"] if named(run, point)} for point in points]
    return [[own[seed] for seed in own if all(seed in other for other in runs)] for own in runs]


def _seeds(*points: str) -> str:
    """How many seeds points share, in words."""
    count = len(_shared(*points)[0])
    return "one seed" if count == 1 else f"means of {('two', 'three')[count - 2]} seeds"


def short() -> str:
    """README's: what four methods learned and lost, and what they lost in the reverse order."""
    methods = ("adamw", "elastic", "lora", "elastic-lora")
    points = [_best(method) for method in methods]
    assert len(_shared(*points)[0]) == 2, "README says how many seeds there are"
    scores = _scores(*points)
    _, reverse = _scores(*(f"{best_points('gemma')[method]}-{REVERSE}" for method in methods))
    *first, last = (number(share, ".0%") for share in reverse)
    learned, lost = ([number(value, form) for value in own] for own, form in zip(scores, (".3f", ".0%"), strict=True))
    return (
        f"AdamW learned {learned[0]} bits per byte and lost {lost[0]} of it, `elastic` {learned[1]} and {lost[1]}; "
        f"LoRA {learned[2]} and {lost[2]}, `elastic-lora` {learned[3]} and {lost[3]}. In reverse order, one seed, "
        f"they lost {', '.join(first)} and {last}."
    )


def at_best() -> str:
    """AdamW at its best rate, and what share of its learning others reach at theirs."""
    points = [_best(method) for method in ("adamw", "elastic", "elastic-lora", "lora")]
    learned, lost = _scores(*points)
    most, shares = learned[0], [number(own / learned[0], ".0%") for own in learned[1:]]
    gone = [number(share, ".0%") for share in lost]
    return (
        f"At its best rate, {_seeds(*points)}, AdamW learns {most:.3f} and loses {gone[0]}; `elastic` at its own "
        f"learns {shares[0]} of that and loses {gone[1]}, `elastic-lora` {shares[1]} and {gone[2]}, LoRA {shares[2]} "
        f"and {gone[3]}."
    )


def _harder(point: str, seed: int = 0) -> float:
    """By how much base text became harder, bits per byte, in a point's run with this seed."""
    (run,) = (run for run in results("arena/gemma")["runs"] if run["name"] == f"{point}-seed{seed}")
    return harder(run)


def base() -> str:
    """The KL divergence of base text at the end, each method at its best rate, of the first seed."""
    points = [_best(method) for method in ("elastic", "elastic-lora", "adamw")]
    runs = [run for run in results("arena/gemma")["runs"] if run["drift"][-1] is not None and run["seed"] == 0]
    pull, adapter, adamw = (next(run["drift"][-1] for run in runs if named(run, point)) for point in points)
    changes = [_harder(point) for point in points]
    assert max(changes[:2]) < changes[2] / 3, "ours keep base text much better"
    others = {run["name"].rpartition("-seed")[0] for run in runs if run["method"] in ("l2-sp", "lora", "self-replay")}
    least = min(_harder(point) for point in others if point.endswith(GIVEN))
    return (
        f"By the KL divergence of base text, first seed, the models end {pull:.2f} (`elastic`) and {adapter:.2f} nats "
        f"a token (`elastic-lora`) from the base model, AdamW {adamw:.2f}. Base text becomes harder by "
        f"{max(changes[:2]):.3f} at most there, with AdamW by {changes[2]:.3f}, with L2-SP, LoRA and self-replay by "
        f"{least:.3f} or more"
    )


def kept() -> str:
    learned, lost = _scores("adamw-5e-05-given", "elastic-5e-05-given")
    more, kept = number(learned[1] / learned[0] - 1, ".0%"), number(1 - lost[1], ".0%")
    return (
        f"At the same rate, 5e-5, `elastic` learns {more} more than AdamW and keeps {kept} of it, where AdamW keeps "
        f"nothing: a domain that comes later finds the model better than AdamW leaves it."
    )


def adapter() -> str:
    learned, lost = _scores("lora-0.0005-given", "elastic-lora-0.0005-given")
    assert abs(learned[0] - learned[1]) < 2e-3 and lost[0] > 0.5, "the sentence says so"
    kept = number(1 - lost[1], ".0%")
    return f"At 5e-4 `elastic-lora` learns what LoRA does and keeps {kept} of it, where LoRA keeps less than half"


def others() -> str:
    """Baselines, each at its best rate, over the seeds that all of them have."""
    points = [_best(method) for method in _OTHERS]
    assert points[0].startswith("sfa-pair"), "the next sentence says so"
    said = []
    for name, learned, lost in zip(_OTHERS.values(), *_scores(*points), strict=True):
        learns, loses = ("", "") if said else ("learns ", "loses ")
        said.append(f"{name} {learns}{learned:.2f} and {loses}{number(lost, '.0%')}")
    return f"{', '.join(said)} ({_seeds(*points)})."


def running() -> str:
    """SFA as tuning chose it, which keeps base text as elastic does."""
    (learned,), (lost,) = _scores(f"sfa-2e-05-{GIVEN}")
    change, ours = (_harder(f"{method}-2e-05-{GIVEN}") for method in ("sfa", "elastic"))
    assert abs(change - ours) < 1e-3, "the sentence says that they are alike"
    return (
        f"This SFA averages before and after, as in its paper. By the running mean, which tuning chose, it learns "
        f"{learned:.2f} and loses {number(lost, '.0%')} at 2e-5, and base text becomes harder by {change:.3f}, as it "
        f"does for `elastic` there."
    )


def second() -> str:
    """Base text with the second seed, each method at its best rate."""
    elastic, adamw, lora = (_harder(_best(method), 1) for method in ("elastic", "adamw", "lora"))
    assert elastic < adamw < lora, "the order is that of the sentence"
    return (
        f"With the second seed `elastic` makes base text harder by {elastic:.3f}, AdamW by {adamw:.3f}, LoRA by "
        f"{lora:.3f}."
    )


def reverse() -> str:
    """The reverse order, each method at its best rate of the first one."""
    names = {method: CALLED[method] for method in ("adamw", "elastic", "elastic-lora", "lora")} | _OTHERS
    points = {name: f"{best_points('gemma')[method]}-{REVERSE}" for method, name in names.items()}
    made = {run["name"].rpartition("-seed")[0] for run in results("arena/gemma")["runs"] if "failed" not in run}
    points = {name: point for name, point in points.items() if point in made}
    assert len(_shared(*points.values())[0]) == 1, "the sentence says how many seeds there are"
    said = []
    for (name, point), learned, lost in zip(points.items(), *_scores(*points.values()), strict=True):
        learns, loses, by = ("", "", "") if said else ("learns ", "loses ", "base text ")
        change = number(_harder(point), "+.3f")
        said.append(f"{name} {learns}{learned:.3f} and {loses}{number(lost, '.0%')} ({by}{change})")
    return f"In the reverse order, one seed, at the same rates {'; '.join(said)}."


def own() -> str:
    """What domains gain from where they begin, not from the base model."""
    gains = []
    for (runs,) in map(_shared, ("adamw-5e-05-given", "elastic-5e-05-given")):
        scores = [run["R"]["bits_per_byte"] for run in runs]
        gains.append(fmean(fmean(R[j][j] - R[j + 1][j] for j in range(len(R) - 1)) for R in scores))
    adamw, elastic = (number(gain, ".2f") for gain in gains)
    return f"From where each domain begins AdamW gains {adamw} bits per byte and `elastic` {elastic}"


SENTENCES = (at_best, base, kept, own, adapter, others, running, second, reverse)
"""Of results.md."""
