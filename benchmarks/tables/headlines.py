"""Sentences of README and results.md, made of the results.

A function that says more or less of a difference fails where its sign has turned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from benchmarks.arena import main_study, main_table, size

from . import gemma
from .cells import CALLED, answers, between, exact_answers, harder, mean_of, named, number, results


def _main() -> str:
    return main_table.sentence(results("arena/main")["runs"])


def _more(*names: str, alike: bool = False) -> list[str]:
    """Points of the gain that rows of the main table lose more than `elastic` at equal learning.

    Args:
        alike: domains' shares count alike.
    """
    runs = results("arena/main")["runs"]
    counted = main_table.counted_alike(runs) if alike else runs
    gaps = {entry.name: entry.beside for entry in main_table.entries(counted)}
    found = [gap and gap.more for gap in map(gaps.get, names)]
    assert all(more and more.half_width and more.mean > more.half_width for more in found), "sure, and more"
    return [main_table.shown(more, ".1f", 100.0) for more in found]


def _main_short() -> str:
    kfac, stronger, adamw = _more("kfac-laplace", f"kfac-laplace{main_study.OTHER}", "adamw")
    nulls = {null: gap.more for null, at, gap in main_table.nulls(results("arena/main")["runs"]) if at == 20}
    random, one = (main_table.shown(nulls[null], ".1f", 100.0) for null in ("null-directions", "null-one"))
    return (
        f"At equal learning K-FAC Laplace loses {kfac} points of the gain more than `elastic` ({stronger} at thrice "
        f"its strength), AdamW {adamw}; at default strength, `elastic` with random directions {random}, with one "
        f"strength for all {one}."
    )


def _main_more() -> str:
    kfac, ewc, sfa, replay, own, adamw = _more("kfac-laplace", "ewc", "sfa", "replay-5", "self-replay", "adamw")
    return (
        f"At equal learning baselines lose more than `elastic`, in points: K-FAC Laplace {kfac}, EWC {ewc}, SFA "
        f"{sfa}, replay of 5 % {replay}, self-replay {own}, AdamW {adamw}."
    )


def _thrice() -> str:
    """The two baselines that come nearest, where they hold back more than tuning chose."""
    kfac, ewc = _more(*(f"{entry}{main_study.OTHER}" for entry in ("kfac-laplace", "ewc")))
    chosen, thrice = (
        [mean_of("main", "acc", f"{entry}{at}-given") for entry in ("kfac-laplace", "ewc")] for at in ("", "@other-1")
    )
    assert all(map(float.__lt__, chosen, thrice)), "the sentence says that they end higher"
    return (
        f"At three times the strength that tuning chose, K-FAC Laplace loses {kfac} more there, EWC {ewc}; they learn "
        f"less and end higher, at {thrice[0]:.2f} and {thrice[1]:.2f}."
    )


def _kfac() -> str:
    """K-FAC Laplace beside EWC, at the rates that were chosen and at twice its own."""
    points = ("kfac-laplace", "ewc", "kfac-laplace@2")
    ends, lost = ([mean_of("main", key, f"{point}-given") for point in points] for key in ("acc", "gain_lost"))
    assert abs(ends[0] - ends[1]) < 0.02 < ends[0] - ends[2], "the sentence says which end alike and which lower"
    shares = [number(share, ".0%") for share in lost]
    return (
        f"K-FAC Laplace ends at {ends[0]:.2f}, as EWC does, but loses {shares[0]} where EWC loses {shares[1]}. Tuning "
        f"chose the lowest of its rates; at twice that it ends at {ends[2]:.2f} and loses {shares[2]}."
    )


def _main_alike() -> str:
    """What weighs in the shares, and what they are where all domains weigh the same."""
    shares = []
    for run in results("arena/main")["runs"]:
        if named(run, "elastic-given"):
            base, *after = run["R"]["bits_per_byte"]
            gains = [base[j] - after[j][j] for j in range(len(after) - 1)]
            shares.append(gains[0] / sum(gains))
    curvature, kfac, ewc, one, adamw = _more("curvature", "kfac-laplace", "ewc", "null-one", "adamw", alike=True)
    return (
        f"{number(fmean(shares), '.0%')} of the gain that `elastic` could lose is MBPP's, which the model knows least "
        f"of. Where the three domains' shares count alike, `curvature` loses {curvature} points more, K-FAC Laplace "
        f"{kfac}, EWC {ewc}, the null of one strength {one}, AdamW {adamw}."
    )


def _main_ends() -> str:
    (learned, elastic), (bound, joint), (fast, adamw) = (
        [f"{mean_of('main', key, f'{row}-given'):.2f}" for key in ("learned", "acc")]
        for row in ("elastic", "joint", "adamw@2")
    )
    scores = {entry.name: entry.scores for entry in main_table.entries(results("arena/main")["runs"])}
    later, most = (main_table.shown(scores[row]["later"], ".2f", 1.0).split()[0] for row in ("elastic", "joint"))
    return (
        f"`elastic` learns {learned}, of the domains after the first {later}, and ends at {elastic}. Training on all "
        f"four at once, a bound, learns {bound} and {most} and ends at {joint}; AdamW at twice the rate that tuning "
        f"chose learns {fast} and ends at {adamw}."
    )


def _strength() -> str:
    """`elastic` at both of its strengths, on test records."""
    (default, lost), (weaker, lost_weaker) = (
        [mean_of("main", key, f"{point}-given") for key in ("learned", "gain_lost")]
        for point in ("elastic@other-1", "elastic")
    )
    gaps = {entry.name: entry.beside for entry in main_table.entries(results("arena/main")["runs"])}
    gap, null = (
        own and own.more for own in map(gaps.get, (f"{row}{main_study.OTHER}" for row in ("elastic", "null-one")))
    )
    assert null and null.half_width and abs(null.mean) < null.half_width, (
        "the sentence says that they are not told apart"
    )
    assert gap and gap.half_width and gap.mean < -gap.half_width, "the sentence says that it loses less"
    less = main_table.shown(gap, ".1f", 100.0).removeprefix("−")
    return (
        f"At its default strength, 20, `elastic` learned {default:.2f} and lost {number(lost, '.1%')}, at 5, which "
        f"tuning chose, {weaker:.2f} and {number(lost_weaker, '.1%')}; at equal learning 20 loses {less} points less, "
        "and the null of one strength at 20 is not told apart from `elastic` at 5 "
        f"({main_table.shown(null, '+.1f', 100.0)})."
    )


def _long(domains: int, steps: int) -> dict[str, Mapping[str, float]]:
    """Row → summary of its run of `long`."""
    shape = f"{domains}x{steps}-"
    runs = [run for run in results("arena/long")["runs"] if run["name"].startswith(shape)]
    return {run["name"].removeprefix(shape): run["summary"] for run in runs}


def _sixteen_short() -> str:
    runs = _long(16, 30)
    learned, lost = (
        [number(runs[entry][key], form) for entry in ("adamw", "kfac-laplace", "elastic")]
        for key, form in (("learned", ".2f"), ("gain_lost", ".0%"))
    )
    return (
        f"Over sixteen domains, one seed, tuned on others, AdamW learned {learned[0]} and lost {lost[0]}, K-FAC "
        f"Laplace {learned[1]} and {lost[1]}, `elastic` {learned[2]} and {lost[2]}."
    )


def _sixteen() -> str:
    """Who ends lowest over sixteen domains, and what it costs."""
    runs = _long(16, 30)
    own, kfac, adamw = (runs[entry] for entry in ("elastic", "kfac-laplace", "adamw"))
    others = [run for entry, run in runs.items() if entry != "elastic"]
    assert own["acc"] < min(run["acc"] for run in others), "it ends lowest"
    assert own["learned"] > max(run["learned"] for run in others), "it learns most"
    assert kfac["gain_lost"] == min(run["gain_lost"] for run in runs.values()), "it loses least"
    ended = sorted(run["acc"] for run in others)
    lost = [number(run["gain_lost"], ".0%") for run in (own, kfac, adamw)]
    return (
        f"Over sixteen domains `elastic` learns most ({own['learned']:.2f}) and ends lowest, at {own['acc']:.2f}, the "
        f"baselines at {ended[0]:.2f} to {ended[-1]:.2f}. It loses {lost[0]}; K-FAC Laplace loses least, {lost[1]}, "
        f"and learns {kfac['learned']:.2f}; AdamW loses {lost[2]}."
    )


def _longer() -> str:
    """What more steps make of the share that is lost, with the first seed."""
    short = {run["name"]: run["summary"] for run in results("arena/main")["runs"]}
    said = []
    for entry in ("adamw", "ewc", "kfac-laplace", "elastic"):
        runs = (short[f"{entry}-given-seed0"], _long(4, 100)[entry])
        before, after = (number(run["gain_lost"], ".0%") for run in runs)
        said.append(f"{CALLED[entry]} {before} and {after}")
    longest = [_long(4, 300)[entry] for entry in ("adamw", "ewc", "elastic")]
    adamw, ewc, own = (f"{number(run['gain_lost'], '.0%')} of {run['learned']:.2f}" for run in longest)
    return (
        f"Of four domains, at 30 and at 100 steps each, they lose, with one seed: {', '.join(said)}; at 300 AdamW "
        f"loses {adamw} learned, EWC {ewc}, `elastic` {own}."
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


def _moments() -> str:
    """What second moments of rows are worth, to the pull and to the baseline that comes nearest."""
    names = ("elastic", "null-moments", "kfac-laplace", "kfac-rows")
    pull, entries, kfac, rows = (main_study.best(results("arena/tuning")["runs"])[name]["summary"] for name in names)
    assert 0 < entries["acc"] - pull["acc"] < 0.03 < rows["acc"] - kfac["acc"], "the text says little, and worse"
    return (
        f"with AdamW's moments the pull ends at {entries['acc']:.2f} in place of {pull['acc']:.2f} and loses "
        f"{number(entries['gain_lost'], '.1%')} in place of {number(pull['gain_lost'], '.1%')}; K-FAC Laplace with "
        f"moments of rows ends at {rows['acc']:.2f} in place of {kfac['acc']:.2f}"
    )


def _tuned_ends() -> str:
    """How many rows chose an end of their rates."""
    best = main_study.best(results("arena/tuning")["runs"])
    ends = {}
    for entry, run in best.items():
        rates = [setting["lr"] for setting in main_study.settings_of(entry)]
        ends[entry] = (run["settings"]["lr"] == min(rates)) - (run["settings"]["lr"] == max(rates))
    low, high = (sum(end == way for end in ends.values()) for way in (1, -1))
    assert ends["kfac-laplace"] == ends["self-replay"] == ends["null-directions"] == 1, "the sentence names them"
    return (
        f"{low} of {len(ends)} rows chose the lowest of their rates, K-FAC Laplace, self-replay and the null of random "
        f"directions among them, and {high} the highest"
    )


def _further() -> str:
    """Whether what tuning chose from was too narrow for baselines and nulls."""
    chosen, runs = main_study.best(results("arena/tuning")["runs"]), results("arena/further")["runs"]
    gains = [chosen[run["name"].partition(".")[0]]["summary"]["acc"] - run["summary"]["acc"] for run in runs]
    lower = [gain for gain in gains if gain > 0]
    most, end = number(max(lower), ".3f"), "ends" if len(lower) == 1 else "end"
    return (
        f"Baselines and nulls have been tried beyond these ends, on the tuning domains: {len(lower)} of {len(runs)} "
        f"such settings {end} lower, by at most {most} bits per byte"
    )


_OF_QWEN = ("adamw", "elastic", "lora", "elastic-lora")


def _qwen() -> str:
    runs = {run["method"]: run for run in results("arena/qwen")["runs"]}
    said, right = [], []
    for method in _OF_QWEN:
        run = runs[method]
        learned, lost = number(run["summary"]["learned"], ".3f"), number(run["summary"]["gain_lost"], ".0%")
        change = number(harder(run), "+.3f")
        learns, loses, by = ("", "", "") if said else ("learns ", "loses ", "base text ")
        said.append(f"{CALLED[method]} {learns}{learned} and {loses}{lost} ({by}{change})")
        base, _, end = answers(run, "accuracy", len(run["domains"]))
        right.append(end)
    return (
        f"{'; '.join(said)}. Of the answers by likelihood the base model has {number(base, '.0%')} right, each of the "
        f"{len(_OF_QWEN)} methods {between(right, '.0%')} at the end"
    )


def _qwen_short() -> str:
    """README's, after a sentence that names the four methods."""
    runs = {run["method"]: run for run in results("arena/qwen")["runs"]}
    *first, last = (f"{runs[method]['summary']['acc']:.3f}" for method in _OF_QWEN)
    base = fmean(runs["adamw"]["R"]["bits_per_byte"][0])
    return (
        f"On Qwen2.5-Coder 0.5B, 15 steps, one rate each, they ended at {', '.join(first)} and {last} bits per byte "
        f"({base:.3f} before)."
    )


def _size() -> str:
    return size.sentence(size.of_results())


def _size_others() -> str:
    found = [point for point in size.of_results() if point.model == "base-5m"]
    lost, learned = (fmean(getattr(point, key) for point in found) for key in ("lost", "learned"))
    millions = number(found[0].parameters / 1e6, ".1f")
    return (
        f"base-5m, of {millions} M parameters, has six layers in place of two and has read "
        f"300 times as much text: it loses {number(lost, '.0%')} there, of {number(learned, '.2f')} learned"
    )


def _size_real() -> str:
    (point,) = (point for point in size.of_results() if point.model == "gemma-trimmed")
    return (
        f"Gemma, of {number(point.parameters / 1e6, '.0f')} M, loses {number(point.lost, '.0%')} there, of "
        f"{number(point.learned, '.2f')} learned"
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
    "README.md": (_demo, gemma.short, _qwen_short, _main_short, _sixteen_short, _leak),
    "docs/optimizers.md": (_leak_of_rounding, _step_of_elastic),
    "docs/speed.md": (_products,),
    "docs/results.md": (
        *gemma.SENTENCES,
        *(_main, _main_more, _thrice, _main_ends, _main_alike, _kfac, _sixteen, _longer, _qwen),
        *(_strength, _tuned, _tuned_ends, _further, _moments, _sequence, _size, _size_others, _size_real),
    ),
}
"""Document → its sentences."""
