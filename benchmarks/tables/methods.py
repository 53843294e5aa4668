"""Tables of what methods learned and forgot."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress
from statistics import fmean
from typing import Any

from benchmarks.arena import ceiling, main_study, main_table, size

from .cells import answers, bare, bold, exact_answers, harder, number, results, several, table

_SHORT = {
    "adamw": "sequential AdamW",
    "replay-5": "replay, 5 % of the records old",
    "ewc": "online EWC",
    "kfac-laplace": "K-FAC Laplace",
    "elastic": "`elastic`",
    "joint": "all four domains at once (bound)",
}
"""A row of the main table → what README calls it."""


def main() -> str:
    """The main table, means with intervals over seeds."""
    rows = main_table.rows(results("arena/main")["runs"])
    header = [f"{name}, %" if name == "lost" else name for name in main_table.HEADER]
    return table(header, [[f"`{name}`", whose, f"`{chosen}`", *cells] for name, whose, chosen, *cells in rows])


def main_short() -> str:
    """The rows of it that README shows, by what they end at."""
    rows = []
    for name, _, _, _, learned, _, lost, acc, *_ in main_table.rows(results("arena/main")["runs"]):
        if name in _SHORT:
            cells = [_SHORT[name], learned, lost and f"{lost} %", acc]
            rows.append(bold(cells) if name == main_table.OURS else cells)
    return table(("bits per byte", "learned", "part of it lost", "at the end (lower is better)"), rows)


def study(name: str, form: str = ".2f") -> str:
    """A row for each point and order of a study, a method's rates side by side: means over seeds, and of several seeds
    the least and the most."""
    points: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for run in results(f"arena/{name}")["runs"]:
        if "failed" not in run:
            # Rounded: a rate that was computed may be off by a bit.
            lr, point = float(f"{run['settings']['lr']:g}"), run["name"].rsplit("-seed", 1)[0].removesuffix("-given")
            label = point.removesuffix("-reverse").removesuffix(f"-{lr:g}")
            points.setdefault((label, run["domains"][0], lr), []).append(run)
    found = list(dict.fromkeys(label for label, *_ in points))
    rows = []
    for (label, first, lr), runs in sorted(points.items(), key=lambda one: (found.index(one[0][0]), *one[0][1:])):
        summaries = [run["summary"] for run in runs]
        columns = ((key, ".0%" if key == "gain_lost" else form) for key in ("learned", "gain_lost", "acc"))
        cells = [several([summary[key] for summary in summaries], shown) for key, shown in columns]
        read = [run for run in runs if run["R_reference"][0] is not None]
        base = several(list(map(harder, read)), "+" + form) if read else ""
        drift = several([run["drift"][-1] for run in read], form) if read else ""
        asked = [answers(run, "accuracy", len(run["domains"])) for run in runs if "accuracy" in run["R"]]
        right = [several(shares, ".0%") for shares in zip(*asked, strict=True)] if asked else [""] * 3
        rows.append([f"`{label}`", f"{lr:g}", f"{first} first", str(len(runs)), *cells, base, drift, *right])
    header = ["", "rate", "order", "seeds", "learned", "lost", "ACC", "change of base text", "KL there"]
    header += ["right answers, base model", "when learned", "at the end"]
    used = [any(column) for column in zip(*rows, strict=True)]
    return table(list(compress(header, used)), [list(compress(row, used)) for row in rows])


def long() -> str:
    """What tuning chose over more domains and more steps, one seed, by what it ends at."""
    rows: dict[str, list[tuple[float, list[str]]]] = {}
    for run in results("arena/long")["runs"]:
        shape, _, entry = run["name"].partition("-")
        R, summary, domains = run["R"]["bits_per_byte"], run["summary"], len(run["domains"])
        late = fmean(R[0][j] - R[j + 1][j] for j in range(3 * domains // 4, domains))
        learned = [number(value, ".2f") for value in (summary["learned"], late)]
        ended = [number(summary["gain_lost"], ".0%"), number(summary["acc"], ".2f")]
        setting = [shape.replace("x", " domains, ") + " steps each", f"`{entry}`", f"`{main_table.chosen_of(run)}`"]
        rows.setdefault(shape, []).append((summary["acc"], [*setting, *learned, *ended]))
    header = ("by ACC", "", "rate and option", "learned", "of the last quarter", "lost", "ACC")
    return table(header, [cells for own in rows.values() for _, cells in sorted(own)])


def tuned() -> str:
    """What tuning for the main table chose of each row's six settings, by what it ended at."""
    rows = []
    for entry, best in main_study.best(results("arena/tuning")["runs"]).items():
        lost = "" if best["kind"] == "bound" else number(best["summary"]["gain_lost"], ".0%")
        learned, acc = (number(best["summary"][key], ".2f") for key in ("learned", "acc"))
        rows.append([f"`{entry}`", f"`{main_table.chosen_of(best)}`", learned, lost, acc])
    return table(("by ACC", "rate and option", "learned", "lost", "ACC"), sorted(rows, key=lambda row: row[-1]))


def further() -> str:
    """What rows end at beyond the end of what tuning chose from, beside what it chose."""
    chosen, rows = main_study.best(results("arena/tuning")["runs"]), []
    for run in results("arena/further")["runs"]:
        entry = run["name"].partition(".")[0]
        scores = (chosen[entry]["summary"], run["summary"])
        cells = [number(own[key], form) for own in scores for key, form in (("gain_lost", ".0%"), ("acc", ".3f"))]
        cells = [f"`{main_table.chosen_of(chosen[entry])}`", *cells[:2], f"`{main_table.chosen_of(run)}`", *cells[2:]]
        rows.append([f"`{entry}`", *cells])
    header = ("", "tuning chose", "lost", "ACC", "beyond it", "lost", "ACC")
    return table(header, sorted(rows, key=lambda row: row[-1]))


def sizes() -> str:
    """What AdamW forgets of models of several sizes, where they have learned alike."""
    return table(size.HEADER, size.rows(size.of_results()))


def demo() -> str:
    """`make demo` over seeds: means, the least and the most."""
    rows = []
    for name in ("adamw", "lora", "elastic"):
        runs = [run for run in results("arena/demo")["runs"] if run["method"] == name]
        columns = (("learned", ".2f"), ("gain_lost", ".0%"), ("acc", ".2f"))
        cells = [several([run["summary"][key] for run in runs], form) for key, form in columns]
        rows.append(
            [f"`{name}`", *cells, *(several(shares, ".0%") for shares in zip(*map(exact_answers, runs), strict=True))]
        )
    return table(("", "learned", "part of it lost", "ACC", "exact answers when learned", "at the end"), rows)


def ceiling_learned() -> str:
    """What was learned of sixteen domains, early and late."""
    return table(ceiling.LEARNED, ceiling.learned_rows(results("arena/ceiling")["runs"]))


def ceiling_forecasts() -> str:
    """How far forecasts of what is learned were off."""
    return table(ceiling.FORECAST, ceiling.forecast_rows(results("arena/ceiling")["runs"]))


def streams() -> str:
    """What is lost where nobody announces the domains."""
    ways = {
        "announced": "announced",
        "auto": "found, with [rewind](trainers.md#when-nobody-says-where-a-domain-ends)",
        "late": "found, without",
        "none": "neither: plain AdamW",
    }
    rows = []
    for run in results("streams")["train"]:
        seed = str(run["seed"]) if run["how"] == "announced" else ""
        scores = [number(run["learned"], ".2f"), number(run["lost"], ".0%"), number(run["acc"], ".2f")]
        rows.append([seed, ways[run["how"]], *scores])
    return table(("seed", "how", "learned", "lost", "ACC"), rows)


def plasticity() -> str:
    """Steps to fit random tasks after domains, and what was learned."""
    rows = []
    for run in results("plasticity")["runs"]:
        entries, fits = run["learned"], [run["fits"][after] for after in ("4", "8", "16")]
        learned = [entry["before"] - entry["after"] for entry in entries]
        lost = sum(entry["last"] - entry["after"] for entry in entries[:-1]) / sum(learned[:-1])
        last, alone = (fmean(entry[key] for entry in entries[-2:]) for key in ("after", "alone"))
        steps = [f"{fit['median']:.0f} ({fit['range'][0]} to {fit['range'][1]})" for fit in fits]
        scores = [number(fits[-1]["loss"], ".2f"), number(fmean(learned), ".2f"), number(lost, ".0%")]
        ends = [number(value, ".2f") for value in (fmean(entry["last"] for entry in entries), last, alone)]
        rows.append([_way(run), *steps, *scores, *ends])
    end = ("learned", "lost", "ACC", "bits per byte of the last 2", "alone")
    return table(("way", "after 4", "after 8", "after 16", "loss", *end), rows)


def landed() -> str:
    """Where updates and activation land among the least used neurons, and the interval of random ones."""
    rows = []
    for run in results("plasticity")["runs"]:
        found = [run["woken"]["lowest"][key] for key in ("update", "activation")]
        shares = [(number(one["share"], ".1%"), *(number(end, ".1%") for end in one["null_interval"])) for one in found]
        rows.append([_way(run), *(f"{share} ({low} to {high})" for share, low, high in shares)])
    return table(("way", "update", "activation"), rows)


def _way(run: Mapping[str, Any]) -> str:
    return {"elastic": "elastic, strength 50"}.get(run["name"], run["name"])


def shared_features() -> str:
    """How much of what moved in old outputs lies on directions that the next domain uses."""
    rows = []
    for run in results("shared-features")["runs"]:
        pairs = run["pairs"]
        if run["method"] == "adamw":
            for pair in pairs:
                name = f"{'AdamW, ' * (pair is pairs[0])}{pair['first']} → {pair['second']}"
                shared, null = number(pair["shared"], ".1%"), number(pair["null"], ".0%")
                rows.append([name, number(pair["moved"], ".1%"), f"**{shared}**", null])
            continue
        low, high = (
            {key: pick(pair[key] for pair in pairs) for key in ("moved", "shared", "null")} for pick in (min, max)
        )
        cells = [
            f"{number(low[key], form)[:-2]} to {number(high[key], form)}"
            for key, form in (("moved", ".2%"), ("shared", ".0%"), ("null", ".0%"))
        ]
        rows.append([f"`{run['method']}`", *cells])
    through = "of it through directions that the next domain uses"
    return table(("", "old outputs moved, of their energy", through, "a change in random directions"), rows)


def permuted_digits() -> str:
    """Ten permuted tasks: means of three seeds, the leak of the worst."""
    names = {
        "adamw": "AdamW, tuned to learn",
        "adamw-best-acc": "AdamW, tuned for accuracy at the end",
        "projected-gradient": "AdamW on projected gradients",
        "gpm": "GPM (SGD)",
        "orthogonal": "`SubspaceProjectedAdamW`",
    }
    runs, rows = results("permuted-digits"), []
    for method, name in names.items():
        own = [run for run in runs if run["method"] == method]
        means = [bare(fmean(run[key] for run in own), ".3f") for key in ("acc", "bwt", "learning_accuracy")]
        leak = max((max(run["leak"].values()) for run in own if run["leak"]), default=0.0)
        small = f"{leak:.0e}".replace("e-0", "e-") if leak else ""
        shown = bare(leak, ".2f") if leak > 0.01 else small
        rows.append([name, *means, shown])
    return table(("", "accuracy at the end", "BWT", "learning accuracy", "leak, worst layer"), rows)


def learn_first() -> str:
    """A first domain by `sparse-cl learn`: how the base text fares by what protects it."""
    ways = {
        "1-self": "256 texts that it wrote itself (`--protect self`, the default)",
        "1-file": "a text of its pretraining (`--protect FILE.txt`)",
        "1-nothing": "nothing (`--protect none`), which is AdamW",
    }
    found = results("learn-base-5m")
    base, rows = found["base"], []
    for key, name in ways.items():
        moved, learned = found[key]["base text"] - base["base text"], base["math"] - found[key]["math"]
        rows.append([name, number(moved, "+.3f"), number(learned, ".2f")])
    return table(("first domain, the base model protected by", "base text", "learned"), rows)


def learn_second() -> str:
    """A second domain after the first that its own texts protected."""
    found = results("learn-base-5m")
    first, base, rows = found["1-self"], found["base"], []
    for method in ("elastic", "adamw"):
        then = found[f"2-{method}"]
        lost, gained = then["math"] - first["math"], base["math"] - first["math"]
        cells = [number(first["medical"] - then["medical"], ".2f"), f"{lost:.3f} ({number(lost / gained, '.1%')})"]
        rows.append([f"`{method}`", *cells, number(then["base text"] - first["base text"], "+.3f")])
    header = ("second domain, after the first of these", "learned", "of the first lost", "base text since the first")
    return table(header, rows)
