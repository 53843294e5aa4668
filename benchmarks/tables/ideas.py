"""Sentences of ideas.md, made of the results.

A function that says more or less of a difference fails where its sign has turned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from benchmarks.arena import ceiling
from benchmarks.arena.intervals import Interval
from benchmarks.arena.streams import interval

from . import conjectures, routing
from .cells import bare, between, mean_of, number, results, sixteen


def _superposition() -> str:
    found = {model["model"]: model["superposition"] for model in results("real-models")}
    (own, null), (gemma, of_gemma) = (
        [bare(found[name][key], ".3f") for key in ("mean", "null")] for name in ("base-5m", "gemma-trimmed")
    )
    return (
        f"a neuron has {own} of a dimension to itself in this model, random directions of the same lengths {null} "
        f"(Gemma 3 270M, trimmed vocabulary: {gemma} and {of_gemma})"
    )


def _routed() -> str:
    gaps = routing.beside_top()
    none = [_points(routing.beside_top(order)["none"].more) for order in (0, 1)]
    ends = {way: routing.lowest_end(way) for way in ("adamw", "top", "none")}
    mask = gaps["mask"].more
    assert ends["adamw"] < ends["top"] and mask is not None and mask.count == 3
    return (
        f"at equal learning it loses {_points(mask)} points less of the gain than one mask a domain (both "
        f"orders, three seeds), and {_points(gaps['none'].more)} less than the same branch without routing "
        f"({none[0].split()[0]} in one order, {none[1].split()[0]} in the other); AdamW of all weights loses "
        f"{_points(gaps['adamw'].more, -1)} less than routing, and ends lower (ACC {ends['adamw']:.2f}; routed "
        f"{ends['top']:.2f} at best, without routing {ends['none']:.2f})"
    )


def _points(more: Interval | None, sign: int = 1) -> str:
    """Percentage points and half of their interval.

    Raises:
        ValueError: it has another sign than the sentence says, or no interval.
    """
    if more is None or more.half_width is None or more.mean * sign <= 0:
        raise ValueError(f"the sentence wants a difference of sign {sign:+d} with an interval, and there is {more}")
    return f"{100 * more.mean * sign:.1f} ± {100 * more.half_width:.1f}"


def _shared_neurons() -> str:
    own, earlier, _ = (number(share, ".1%") for share in routing.shared_neurons("top"))
    return (
        f"a token shares {earlier} of its k neurons with a token of an earlier domain, hardly fewer than with one of "
        f"its own ({own})"
    )


def _tracks() -> str:
    columns = (("learned", ".2f"), ("gain_lost", ".0%"), ("acc", ".2f"))
    studies = {"two-four-0.001": "tracks", "adamw-0.001": "tracks", "adamw-0.0002": "routed"}
    own, reverse, adamw, adamw_reverse, low, low_reverse = (
        [number(mean_of(study, key, f"{point}-{order}"), form) for key, form in columns]
        for point, study in studies.items()
        for order in ("given", "reverse")
    )
    return (
        f"test records, three seeds: learned {own[0]} and lost {own[1]} (ACC {own[2]}; reverse order "
        f"{', '.join(reverse)}), where AdamW learned {adamw[0]} and lost {adamw[1]} ({adamw[2]}; reverse order "
        f"{', '.join(adamw_reverse)}), and at 2e-4 {low[0]} and {low[1]} ({low[2]}; reverse order "
        f"{', '.join(low_reverse)})"
    )


def _low_rate() -> str:
    learned, lost, acc = (mean_of("routed", key, "adamw-0.0001-reverse") for key in ("learned", "gain_lost", "acc"))
    best = min(mean_of("routed", "acc", f"adamw-{rate}-given") for rate in ("0.0001", "0.0002", "0.0004"))
    return (
        f"AdamW at a low rate, which learned {learned:.2f}, lost {number(lost, '.0%')} and ended at {acc:.2f} (1e-4, "
        f"three seeds, study `routed`); in the given order, where it ends at {best:.2f} at best (2e-4)"
    )


def _streams() -> str:
    found, gradual = results("streams")["detect"], results("streams")["gradual"]
    alarms, batches = (sum(one[key] for one in found) for key in ("false alarms", "batches"))
    boundaries, missed = (sum(one[key] for one in found) for key in ("boundaries", "missed"))
    low, high = interval(alarms, batches)
    less = between(((told["lost"] - auto["lost"]) * 100 for told, auto in _trained("announced", "auto")), ".1f")
    more = between(((late["lost"] - told["lost"]) * 100 for told, late in _trained("announced", "late")), ".0f")
    return (
        f"{boundaries - missed} of {boundaries} boundaries noticed at most "
        f"{max(max(one['delays']) for one in found)} batches late; {1000 * alarms / batches:.2f} false alarms in 1,000 "
        f"batches ({alarms} in {batches:,}; 95 %: {low:.2f} to {high:.2f}) where 1 was allowed; "
        f"{sum(one['found'] for one in gradual)} of {sum(one['streams'] for one in gradual)} gradual mixtures noticed. "
        f"`elastic` that finds its boundaries loses no more than one that is told them (three seeds, {less} "
        f"points less), and {more} points more if it does not go back to before them; plain AdamW loses "
        f"{between((one['lost'] for (one,) in _trained('none')), '.0%')}"
    )


def _trained(*hows: str) -> list[list[Mapping[str, Any]]]:
    """For each seed its runs by these ways."""
    runs: dict[int, dict[str, Mapping[str, Any]]] = {}
    for run in results("streams")["train"]:
        runs.setdefault(run["seed"], {})[run["how"]] = run
    return [[by[how] for how in hows] for by in runs.values()]


def _gradual() -> str:
    short, long = results("streams")["gradual"]
    low, high = (f"{end:.0f}" for end in short["interval"])

    def shares(one: Mapping[str, Any], after: int) -> list[str]:
        found = sorted(one["share of the new domain"])
        return [f"{100 * value:.0f}" for value in (median(found), found[0], found[-1 - after])]

    (middle, least, most), (late, from_, to) = shares(short, after=1), shares(long, after=0)
    return (
        f"in a ramp of {short['ramp']} batches, in which a record is of the new one with a rising chance, "
        f"{short['found']} of {short['streams']} streams (95 %: {low} to {high} %) had an alarm, when {middle} % of "
        f"the records were new (median; {least} to {most} %, once after the ramp); in one of {long['ramp']} "
        f"batches {long['found']} of {long['streams']}, at {late} % ({from_} to {to} %)."
    )


def _late() -> str:
    pairs = _trained("announced", "auto")
    less = between((1 - auto["learned"] / told["learned"] for told, auto in pairs), ".0%")
    above = between((auto["acc"] - told["acc"] for told, auto in pairs), ".2f")
    without = between((late["acc"] - told["acc"] for told, late in _trained("announced", "late")), ".2f")
    return (
        f"{less} less is learned than where the boundary is announced. These runs end {above} above the announced ones "
        f"in ACC, those without rewind {without}."
    )


def _energy() -> str:
    tokens, energy, both = results("streams")["energy"]
    late = [f"{fmean(one['delays']):.1f}" for one in (energy, tokens, both)]
    return (
        f"by it alone {energy['missed']} were missed, the others noticed {late[0]} batches late on average; tokens "
        f"alone missed one and were {late[1]} late; both together, which share the false alarms, missed one and were "
        f"{late[2]} late."
    )


def _shared() -> str:
    found = results("shared-features")
    after = {run["method"]: bare(run["after"]["domains"], ".2f") for run in found["runs"]}
    before, null = (bare(found["base"][key], ".2f") for key in ("domains", "domains_null"))
    return (
        f"The mean inputs of the four domains have {before} of a dimension each, where random directions have {null}; "
        f"after four domains {after['adamw']} with AdamW, {after['elastic']} with `elastic`, "
        f"{after['orthogonal']} with `orthogonal`."
    )


def _plasticity() -> str:
    fits = {run["name"]: run["fits"]["16"] for run in results("plasticity")["runs"]}
    loss = {name: f"{fit['loss']:.2f}" for name, fit in fits.items()}
    reset = "AdamW, spectral reset"
    return (
        f"loses two, has the lowest loss ({loss['AdamW, L2 to init']}, AdamW {loss['AdamW']}), and forgets more than "
        f"AdamW. Putting each matrix's singular values back after a domain costs nothing and changes hardly more "
        f"({fits[reset]['median']:.0f} steps, {loss[reset]}). Neither a tenth of the neurons drawn anew before each "
        f"domain (recycled, as ReDo does) nor the pull helps: the two that draw neurons anew have the "
        f"highest loss ({loss['selective-write, waking']}, {loss['AdamW, neurons recycled']})."
    )


def _woken() -> str:
    found = {run["name"]: run["woken"]["lowest"] for run in results("plasticity")["runs"]}
    plain, waking = found["selective-write"], found["selective-write, waking"]
    nulls = [[f"{100 * end:.0f}" for end in one["update"]["null_interval"]] for one in (plain, waking)]
    random = [f"{100 * end:.1f}" for end in plain["activation"]["null_interval"]]
    updates = [number(one["update"]["share"], ".0%") for one in (plain, waking)]
    activations = [number(one["activation"]["share"], ".1%") for one in (plain, waking)]
    return (
        f"Of a domain's update {updates[0]} lands on the tenth of the neurons that earlier domains use least (random "
        f"neurons: {nulls[0][0]} to {nulls[0][1]} %), {updates[1]} ({nulls[1][0]} to {nulls[1][1]} %) where they are "
        f"drawn anew; of its activation {activations[0]} and {activations[1]} (random: {random[0]} to {random[1]} %)"
    )


_WIDTHS = ("base-5m", "stories260k")


def _ceiling() -> str:
    runs, found = sixteen(), []
    for method in ("orthogonal", "elastic"):
        for model in _WIDTHS:
            pair = runs[model, method], runs[model, "single"]
            found.append((ceiling.early_and_late(*pair), ceiling.judged(*pair)))
    (hard, own), (hard_small, own_small), (pull, of_pull), (pull_small, of_pull_small) = found

    def errors(name: str, *judged: Mapping[str, Any]) -> list[str]:
        return [f"{one[name]['error']:.2f}" for one in judged]

    account = errors("C·B", own, own_small, of_pull, of_pull_small)
    last = errors("as the last", own, own_small, of_pull, of_pull_small)
    return (
        f"of the last four `orthogonal` learns {hard[3]} and {hard_small[3]} of what a fresh model learns of each (of "
        f"the first four {hard[0]} and {hard_small[0]}), `elastic` {pull[3]} and {pull_small[3]}. As a forecast of "
        f"what is learned C·B is off by {account[0]} and {account[1]} bits per byte for `orthogonal`, by {account[2]} "
        f'and {account[3]} for `elastic`; "as the last one" by {", ".join(last[:3])} and {last[3]}'
    )


def _no_ceiling() -> str:
    runs = sixteen()
    learned, lost = (
        [[runs[model, method]["summary"][key] for method in ("adamw", "elastic")] for model in _WIDTHS]
        for key in ("learned", "gain_lost")
    )
    shown = [[number(share, ".0%") for share in shares] for shares in lost]
    late, room, first, last = [], [], [], []
    for model in _WIDTHS:
        shares, own = ceiling.shares(runs[model, "orthogonal"], runs[model, "single"])
        late.append(sum(share * size for share, size in zip(shares[4:], own[4:], strict=True)) / sum(own[4:]))
        room.append([runs[model, "orthogonal"]["domain_records"][j]["room"]["free"] for j in (3, -1)])
        first.append(sum(own[:4]))
        last.append(sum(own[-4:]))
    adamw = ceiling.early_and_late(runs["base-5m", "adamw"], runs["base-5m", "single"])[3]
    return (
        f"On base-5m `elastic` learns {learned[0][1]:.2f} bits per byte, as AdamW does ({learned[0][0]:.2f}), and "
        f"loses {shown[0][1]} of it where AdamW loses {shown[0][0]}; on the smaller model it learns "
        f"{number(1 - learned[1][1] / learned[1][0], '.0%')} less than AdamW and loses {shown[1][1]} where AdamW loses "
        f"{shown[1][0]}. The last domains `elastic` learns as well as a fresh model does: a ceiling is not in sight. "
        f"`orthogonal` meets one: of domains 5 to 16 it learns {late[0]:.2f} and {late[1]:.2f} of what a fresh model "
        f"learns; its free share is {room[0][0]:.2f} and {room[1][0]:.2f} after four domains, and {room[0][1]:.2f} and "
        f"{room[1][1]:.2f} after all. (The last four have little to learn, {last[0]:.1f} bits per byte together on "
        f"base-5m where the first four have {first[0]:.1f}; AdamW, which protects nothing, learns {adamw} of it.)"
    )


def _dolly() -> str:
    runs = sixteen()
    _, own = ceiling.shares(runs["base-5m", "orthogonal"], runs["base-5m", "single"])
    return f"of dolly a fresh model learns {own[-1]:.2f} bits per byte"


def _more_gain() -> str:
    lower = (
        mean_of("waking", "acc", f"selective-plain-{order}") - mean_of("waking", "acc", f"selective-boost-{order}")
        for order in ("given", "reverse")
    )
    return f"loses a little more and ends {between(lower, '.2f')} lower."


def _survives() -> str:
    runs = sixteen()
    hard = [runs[model, "orthogonal"] for model in _WIDTHS]
    survives = [record["room"]["surviving"] for run in hard for record in run["domain_records"][1:]]
    middle = [
        median(ceiling.shares(run, runs[model, "single"])[0][1:]) for run, model in zip(hard, _WIDTHS, strict=True)
    ]
    return (
        f"Behind `orthogonal` {between(survives, '.0%')} of a gradient survives, and about half of the bits are "
        f"learned all the same, of the median domain {middle[0]:.2f} and {middle[1]:.2f}, as"
    )


def _full_factors() -> str:
    learned, lost = (mean_of("main", key, "curvature-given") for key in ("learned", "gain_lost"))
    return f"learned {learned:.2f}, lost {number(lost, '.0%')} with full"


def _used() -> str:
    used, null = conjectures.room()
    return f"four domains use {number(used, '.0%')} of the directions ({number(null, '.0%')} if unrelated)"


SENTENCES: Mapping[str, Sequence[Callable[[], str]]] = {
    "docs/ideas.md": (
        *(_routed, _shared_neurons, _streams, _woken, _tracks, _gradual, _late, _energy, _shared, _plasticity),
        *(_full_factors, _used, _superposition, _low_rate, _more_gain, _ceiling, _no_ceiling, _dolly, _survives),
    ),
}
"""Document → its sentences."""
