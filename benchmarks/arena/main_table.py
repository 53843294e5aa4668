"""The main table: what each row of `main_study` learned and lost, and what it loses more than `elastic` does.

Two rows are compared where they have learned the same: by their curves over rates (`curves`), seed by seed. What counts
as learned there is that of the domains after the first: in the first most methods protect nothing, and learn what AdamW
does at that rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sparse_cl.four_domains.evaluate import METRICS
from sparse_cl.four_domains.metrics import LOWER_IS_BETTER
from sparse_cl.four_domains.report import text_table

from .compare import Comparison, Row, gather_runs
from .curves import Beside, beside
from .intervals import Interval, interval
from .main_study import OTHER, row_and_factor
from .pareto import lines_of

OURS = "elastic"
NULLS = {
    "null-directions": "in random directions",
    "null-strengths": "with shuffled strengths",
    "null-one": "with one strength for all",
    "null-moments": "with a second moment for each entry",
}
PICTURED = (
    *("elastic", "elastic-lora", "curvature", "orthogonal", "null-directions", "null-one"),
    *("adamw", "lora", "sfa", "replay-5", "ewc", "kfac-laplace", "osft"),
)
"""The rows that the picture has: all of them could not be told apart there."""
HEADER = (
    *("by ACC", "whose", "rate and option", "seeds", "learned", "after the first", "lost", "ACC"),
    *("points lost more", "where both have learned"),
)
SHOWN = {"learned": (".2f", 1.0), "later": (".2f", 1.0), "gain_lost": (".1f", 100.0), "acc": (".2f", 1.0)}


@dataclass(frozen=True)
class Entry:
    """A row of the main table.

    Attributes:
        kind: of its method, or "null".
        chosen: what tuning chose, in words.
        scores: of `SHOWN`, over seeds, at the rate that was chosen; "later": learned of the domains after the first.
        reach: the least and the most that it learned of these by its rates; None: there is one rate.
        beside: what it loses more than `OURS`, if there is learning that both reach; None: it is `OURS` or a bound.
    """

    name: str
    kind: str
    chosen: str
    scores: Mapping[str, Interval]
    reach: tuple[float, float] | None
    beside: Beside | None


def entries(runs: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """The rows that have results, by what they end at."""
    points = _points(_after_the_first(runs))
    lines = {entry: _line(entry, own) for entry, own in points.items() if own[""][0]["kind"] != "bound"}
    found = []
    for entry, own in points.items():
        known = {key: interval([run["summary"][key] for run in own[""]]) for key in SHOWN if key != "later"}
        known["later"] = interval([_later(run) for run in own[""]])
        scores = {key: value for key, value in known.items() if value is not None}
        compared = entry != OURS and entry in lines and OURS in lines
        gap = beside(lines[entry], lines[OURS], [_order(own[""][0])]) if compared else None
        learned = sorted(fmean(map(_later, rate)) for rate in own.values())
        reach = (learned[0], learned[-1]) if len(own) > 1 else None
        found.append(Entry(entry, _kind(entry, own[""][0]), chosen_of(own[""][0]), scores, reach, gap))
    return sorted(found, key=lambda entry: entry.scores["acc"].mean)


def _after_the_first(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs of whose domains, by metric, only those after the first count as learned."""

    def learned(run: Mapping[str, Any], metric: str) -> dict[str, Any]:
        base, *after = run["R"][metric]
        ends = [(base[j], after[j][j]) for j in range(1, len(after)) if None not in (base[j], after[j][j])]
        gains = [before - now if metric in LOWER_IS_BETTER else now - before for before, now in ends]
        return {"learned": fmean(gains) if gains else None}

    return _scored_otherwise(runs, learned)


def _scored_otherwise(
    runs: Sequence[Mapping[str, Any]], scores: Callable[[Mapping[str, Any], str], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Runs that did not fail, with other numbers in their summaries by metric."""
    found = []
    for run in runs:
        if "failed" not in run:
            metrics = {name: {**old, **scores(run, name)} for name, old in run["summary"]["by_metric"].items()}
            found.append({**run, "summary": {**run["summary"], "by_metric": metrics}})
    return found


def _later(run: Mapping[str, Any]) -> float:
    return run["summary"]["by_metric"][METRICS[0]]["learned"]


def _points(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Row → factor of the rate → runs, of rows that have the rate that was chosen."""
    points: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for run in runs:
        if "failed" not in run:
            entry, factor = row_and_factor(run["name"])
            points.setdefault(entry, {}).setdefault(factor, []).append(run)
    return {entry: own for entry, own in points.items() if "" in own}


def _kind(entry: str, run: Mapping[str, Any]) -> str:
    return "null" if _without_strength(entry) in NULLS else run["kind"]


def _without_strength(entry: str) -> str:
    return entry.removesuffix(OTHER)


def _line(entry: str, own: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """A row's rates, rising."""
    (line,) = lines_of(gather_runs((run["name"], dict(run)) for runs in own.values() for run in runs).rows)
    for row in line:
        row.name, row.kind = entry, _kind(entry, own[""][0])
    return line


def counted_alike(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs whose share lost is the mean of their domains' shares, so that a domain with large gains weighs no more."""

    def lost(run: Mapping[str, Any], metric: str) -> dict[str, Any]:
        by_domain = run["summary"]["by_metric"][metric]["gain_lost_by_domain"]
        shares = [share for share in by_domain if share is not None]
        return {"gain_lost": fmean(shares) if shares else None}

    return _scored_otherwise(runs, lost)


def pictured(runs: Sequence[Mapping[str, Any]]) -> Comparison:
    """`PICTURED`, by their names here; learned is that of the domains after the first."""
    points = _points(_after_the_first(runs))
    found = {entry: points[entry] for entry in PICTURED if entry in points}
    every = gather_runs((run["name"], dict(run)) for own in found.values() for runs in own.values() for run in runs)
    every.rows = [row for entry, own in found.items() for row in _line(entry, own)]
    return every


def _order(run: Mapping[str, Any]) -> str:
    return " → ".join(run["domains"])


def chosen_of(run: Mapping[str, Any]) -> str:
    """Rate and options of a run, in words; the pull's strength where it is the default, too."""
    options = dict(run["settings"]["method_options"].get(run["method"], {}))
    if "strength" in run["settings"]["method"]:
        options["strength"] = run["settings"]["method"]["strength"]
    return ", ".join([f"{run['settings']['lr']:g}", *(f"{name} {value}" for name, value in options.items())])


def shown(found: Interval | None, form: str, scale: float) -> str:
    """mean ± half of the interval."""
    if found is None:
        return ""
    half = f" ± {found.half_width * scale:{form.lstrip('+')}}" if found.half_width is not None else ""
    return f"{found.mean * scale:{form}}{half}".replace("-", "−")


def rows(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """By `HEADER`; lost in percent of the gain."""
    found = []
    for entry in entries(runs):
        cells = [shown(entry.scores.get(key), *form) for key, form in SHOWN.items()]
        cells[2] = "" if entry.kind == "bound" else cells[2]
        more, learned = (entry.beside.more, entry.beside.learned) if entry.beside else (None, None)
        reach = _reach(learned) if learned else ""
        count = str(entry.scores["acc"].count)
        cells = [entry.name, entry.kind, entry.chosen, count, *cells]
        seeds = f" ({more.count} seeds)" if more and 1 < more.count < entry.scores["acc"].count else ""
        found.append([*cells, shown(more, "+.1f", 100.0) + seeds, reach])
    return found


def sentence(runs: Sequence[Mapping[str, Any]]) -> str:
    """Who loses least at equal learning, by how much, whether that is sure, and what the pull has over its nulls."""
    found = entries(runs)
    rows = [entry for entry in found if entry.beside is not None and _without_strength(entry.name) != OURS]
    gaps = {
        entry.name: entry.beside for entry in rows if entry.beside and entry.beside.more and entry.beside.more.count > 1
    }
    others = [entry for entry in rows if entry.kind != "null"]
    compared = [entry.name for entry in others if entry.name in gaps]
    if not compared:
        return "No two rows have curves yet that can be compared."
    text = _of_rows({name: gaps[name] for name in compared})
    (own,) = (entry.reach or (0.0, 0.0) for entry in found if entry.name == OURS)
    apart = [entry for entry in others if entry.name not in gaps]
    less, more = (
        [entry.name for entry in apart if entry.reach and (entry.reach[1] < own[0], entry.reach[0] > own[1])[way]]
        for way in (0, 1)
    )
    for names, way in ((less, "less"), (more, "more")):
        if names:
            text += f" Not compared, as they learn {way} at all rates: {', '.join(f'`{name}`' for name in names)}."
    if few := len(apart) - len(less) - len(more):
        text += f" {few} of the {len(others)} rows that are no bounds are not compared yet, for want of runs."
    return f"{text}{_of_nulls(runs)}"


def _of_rows(gaps: Mapping[str, Beside]) -> str:
    """Which rows lose more than ours, which less, and which cannot be told apart."""
    by_gap = sorted(gaps, key=lambda name: _more(gaps[name]).mean)
    sure = [name for name in by_gap if _sure(_more(gaps[name]))]
    more, less = ([name for name in sure if (_more(gaps[name]).mean > 0) == positive] for positive in (True, False))
    crossing = [name for name in more if _sure(gaps[name].least) and gaps[name].least.mean < 0]
    text = f"`{OURS}` loses least at equal learning"
    if crossing or len(more) < len(gaps):
        text = f"At equal learning `{OURS}` loses less than {len(more) or 'none'} of {len(gaps)} rows"
    if more:
        text += f": `{more[0]}` loses {_points_of(gaps[more[0]])} points of the gain more, {_where(gaps[more[0]])}"
    text += "."
    for name in less:
        text += f" `{name}` loses {_points_of(gaps[name]).removeprefix('−')} points less, {_where(gaps[name])}."
    for name in crossing:
        own, (least, _) = gaps[name], gaps[name].learned or (0.0, 0.0)
        points = shown(own.least, ".1f", 100.0).removeprefix("−")
        text += f" Curves cross: where both have learned {least:.2f}, `{name}` loses {points} points less."
    most = max((_more(gap).count for gap in gaps.values()), default=0)
    counts = {name: _more(gaps[name]).count for name in by_gap if name not in sure}
    alike = [
        f"`{name}` ({_points_of(gaps[name], '+.1f')}{f', {count} seeds' if count < most else ''})"
        for name, count in counts.items()
    ]
    return f"{text} Not told apart from it: {', '.join(alike)}." if alike else text


def _points_of(gap: Beside, form: str = ".1f") -> str:
    return shown(_more(gap), form, 100.0)


def _where(gap: Beside) -> str:
    return f"where both have learned {_reach(gap.learned or (0.0, 0.0))}"


def _reach(learned: tuple[float, float]) -> str:
    low, high = (f"{end:.2f}" for end in learned)
    return low if low == high else f"{low} to {high}"


def nulls(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, Beside]]:
    """Null, strength, and what it loses more than the pull of that strength."""
    points = _points(_after_the_first(runs))
    lines = {name: _line(name, own) for name, own in points.items() if _without_strength(name) in (OURS, *NULLS)}
    of_pull = {_strength(line): line for name, line in lines.items() if _without_strength(name) == OURS}
    found = []
    for name, line in lines.items():
        if (null := _without_strength(name)) in NULLS and _strength(line) in of_pull:
            gap = beside(line, of_pull[_strength(line)], [_order(points[name][""][0])])
            found += [(null, _strength(line), gap)] if gap.more else []
    return sorted(found, key=lambda one: (list(NULLS).index(one[0]), one[1]))


def _strength(line: Sequence[Row]) -> float:
    return float(line[0].settings["strength"])


def _of_nulls(runs: Sequence[Mapping[str, Any]]) -> str:
    said: dict[str, list[str]] = {}
    for null, strength, gap in nulls(runs):
        said.setdefault(NULLS[null], []).append(f"{_points_of(gap)} at strength {strength:g}")
    words = ", ".join(f"{null} {' and '.join(found)}" for null, found in said.items())
    return f" Nulls lose more than the pull of their strength, in points: {words}." if words else ""


def _more(gap: Beside) -> Interval:
    assert gap.more is not None
    return gap.more


def _sure(more: Interval | None) -> bool:
    return more is not None and more.half_width is not None and abs(more.mean) > more.half_width


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """The sentence and the rows."""
    return f"{sentence(runs)}\n\n{text_table(HEADER, rows(runs))}"
