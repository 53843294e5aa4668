"""Sentences of README and results.md, made of the results.

A function that says more or less of a difference fails where its sign has turned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from benchmarks.arena import main_study, main_table

from .cells import between, exact_answers, mean_of, number, results, sixteen


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


def _main() -> str:
    return main_table.sentence(results("arena/main")["runs"])


def _more(*names: str) -> list[str]:
    """Points of the gain that rows of the main table lose more than `elastic` at equal learning."""
    gaps = {entry.name: entry.beside for entry in main_table.entries(results("arena/main")["runs"])}
    found = [gap and gap.more for gap in map(gaps.get, names)]
    assert all(more and more.half_width and more.mean > more.half_width for more in found), "sure, and more"
    return [main_table.shown(more, ".1f", 100.0) for more in found]


def _main_short() -> str:
    ewc, adamw, one = _more("ewc", "adamw", "null-one")
    return (
        f"At equal learning EWC loses {ewc} points of the gain more than `elastic`, AdamW {adamw}, and the same pull "
        f"with one strength for all directions {one}."
    )


def _main_more() -> str:
    ewc, replay, own, adamw = _more("ewc", "replay-5", "self-replay", "adamw")
    return (
        f"At equal learning baselines lose more than `elastic`, in points: EWC {ewc}, replay of 5 % {replay}, "
        f"self-replay {own}, AdamW {adamw}."
    )


def _main_ends() -> str:
    (learned, elastic), (_, joint), (fast, adamw) = (
        [f"{mean_of('main', key, f'{row}-given'):.2f}" for key in ("learned", "acc")]
        for row in ("elastic", "joint", "adamw@2")
    )
    return (
        f"`elastic` learns {learned} and ends at {elastic}. Training on all four at once, a bound, ends at {joint}; "
        f"AdamW at twice the rate that tuning chose learns {fast} and ends at {adamw}."
    )


def _strength() -> str:
    """At the rate that was chosen, by strength."""
    found = {run["name"]: run["summary"] for run in results("arena/tuning")["runs"]}
    default, weaker = found["elastic.2"], found["elastic.3"]
    assert main_study.chosen(results("arena/tuning")["runs"])["elastic"] == main_study.settings_of("elastic")[3]
    lost = [number(one["gain_lost"], ".1%") for one in (default, weaker)]
    return (
        f"At its default strength, 20, and the same rate it learned {default['learned']:.2f} and lost {lost[0]}, at 5 "
        f"{weaker['learned']:.2f} and {lost[1]}"
    )


def _sixteen_short() -> str:
    runs = sixteen()
    adamw, elastic = (runs["base-5m", method]["summary"] for method in ("adamw", "elastic"))
    lost = [number(summary["gain_lost"], ".0%") for summary in (adamw, elastic)]
    return (
        f"sixteen domains, one seed, AdamW learned {adamw['learned']:.2f} and lost {lost[0]}, `elastic` "
        f"{elastic['learned']:.2f} and {lost[1]}"
    )


def _demo() -> str:
    runs = [run for run in results("arena/demo")["runs"] if run["method"] == "elastic"]
    learned, kept = (fmean(shares) for shares in zip(*map(exact_answers, runs), strict=True))
    lost = [run["summary"]["gain_lost"] for run in runs]
    assert len(runs) == 5, "the sentence says how many seeds there are"
    return (
        f"keeps {number(1 - lost[0], '.0%')} of the gain in bits per byte here and, over five seeds, "
        f"{number(1 - fmean(lost), '.0%')} of it and {number(kept / learned, '.0%')} of the exact answers that it had "
        "learned."
    )


#: Of leak.json, those that the guarantee is of.
_BOUNDED = ("dense", "rows 25 %", "columns 50 %", "LoRA (B A)")


def _leaks(*precisions: str) -> list[float]:
    return [results("leak")["leak"][case][precision] for case in _BOUNDED for precision in precisions]


def _leak() -> str:
    return f"(measured: {max(_leaks('fp32', 'bf16 master')):.0e} or less)"


def _leak_of_rounding() -> str:
    low, high = (f"{leak(_leaks('bf16 weights')):.0e}".replace("e-0", "e-") for leak in (min, max))
    return f"Rounding the masters to bfloat16 weights leaves {low} to {high} there."


def _tuned() -> str:
    ends = {entry: run["summary"] for entry, run in main_study.best(results("arena/tuning")["runs"]).items()}
    own, shuffled, one, random = (
        ends[name] for name in ("elastic", *(f"null-{n}" for n in ("strengths", "one", "directions")))
    )
    others = [end["acc"] for name, end in ends.items() if name not in ("elastic", "single", "joint")]
    assert own["acc"] < min(others), "the sentence says that it is the lowest"
    lost = {number(null["gain_lost"], ".0%") for null in (shuffled, one)}
    acc = {f"{null['acc']:.2f}" for null in (shuffled, one)}
    assert len(lost) == len(acc) == 1, "the sentence says that both nulls are alike"
    share = number(own["gain_lost"], ".0%")
    return (
        f"`elastic` learned {own['learned']:.2f}, lost {share} and ended at {own['acc']:.2f}, lower"
        " than all but the bounds. Its nulls, the same pull with shuffled strengths or one "
        f"strength for all, lost {lost.pop()} and ended at {acc.pop()}; in random directions it ended at "
        f"{random['acc']:.2f}, near AdamW's {ends['adamw']['acc']:.2f}"
    )


def _step_of_elastic() -> str:
    quartiles = [found["quartiles of the ratio of whole steps"] for found in results("elastic-step").values()]
    each, fourth = (
        between((ratios[f"{name} / AdamW"][1] for ratios in quartiles), ".2f")
        for name in ("ElasticAdamW", "ElasticAdamW every=4")
    )
    return f"A whole training step took {each} times AdamW's, {fourth} times with `every=4`"


def _products() -> str:
    found = [own["products"] for run in results("active-linear").values() for own in (run["base-5m"], run["100 M"])]
    return f"Counting matrix products alone, the first column would be {between(found, '.2f')}."


def _sequence() -> str:
    plan = results("plans/llama-3-8b-lora-a100")["methods"]["lora"]
    low, high = (times * plan["device_hours"] + plan["probe_device_hours"] for times in (1, 2.5))
    return (
        f"four domains of 20 to 50 million tokens, LoRA and probing it says {low:.0f} to {high:.0f} hours of one A100 "
        "whose matrix products reach 40 % of its peak"
    )


SENTENCES: Mapping[str, Sequence[Callable[[], str]]] = {
    "README.md": (_demo, _gemma, _main_short, _sixteen_short, _leak),
    "docs/optimizers.md": (_leak_of_rounding, _step_of_elastic),
    "docs/speed.md": (_products,),
    "docs/results.md": (_gemma_kept, _main, _main_more, _main_ends, _strength, _sequence, _tuned),
}
"""Document → its sentences."""
