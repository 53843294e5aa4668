"""The main table: what each row of `main_study` learned and lost, and what it loses more than `elastic` does.

Two rows are compared where they have learned the same: by their curves over three rates (`curves`), seed by seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_cl.four_domains.report import text_table

from .compare import Row, gather_runs
from .curves import Beside, beside
from .intervals import Interval, interval
from .main_study import row_and_factor
from .pareto import lines_of

OURS = "elastic"
NULLS = {
    "null-directions": "in random directions",
    "null-strengths": "with shuffled strengths",
    "null-one": "with one strength for all",
}
HEADER = ("by ACC", "chosen", "seeds", "learned", "lost", "ACC", "points lost more", "where both have learned")
SHOWN = {"learned": (".2f", 1.0), "gain_lost": (".0f", 100.0), "acc": (".2f", 1.0)}


@dataclass(frozen=True)
class Entry:
    """A row of the main table.

    Attributes:
        kind: of its method.
        chosen: what tuning chose, in words.
        scores: of `SHOWN`, over seeds, at the rate that was chosen.
        rates: how many there are runs of.
        beside: what it loses more than `OURS`, if there is learning that both reach; None: it is `OURS` or a bound.
    """

    name: str
    kind: str
    chosen: str
    scores: Mapping[str, Interval]
    rates: int
    beside: Beside | None


def entries(runs: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """The rows that have results, by what they end at."""
    points: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for run in runs:
        if "failed" not in run:
            entry, factor = row_and_factor(run["name"])
            points.setdefault(entry, {}).setdefault(factor, []).append(run)
    points = {entry: own for entry, own in points.items() if "" in own}
    lines = {entry: _line(own) for entry, own in points.items() if own[""][0]["kind"] != "bound"}
    found = []
    for entry, own in points.items():
        known = {key: interval([run["summary"][key] for run in own[""]]) for key in SHOWN}
        scores = {key: value for key, value in known.items() if value is not None}
        compared = entry != OURS and entry in lines and OURS in lines
        gap = beside(lines[entry], lines[OURS], [_order(own[""][0])]) if compared else None
        first = own[""][0]
        found.append(Entry(entry, first["kind"], chosen_of(first), scores, len(own), gap))
    return sorted(found, key=lambda entry: entry.scores["acc"].mean)


def _line(own: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """A row's rates, rising."""
    (line,) = lines_of(gather_runs((run["name"], dict(run)) for runs in own.values() for run in runs).rows)
    return line


def _order(run: Mapping[str, Any]) -> str:
    return " → ".join(run["domains"])


def chosen_of(run: Mapping[str, Any]) -> str:
    """Rate and options of a run, in words."""
    options = run["settings"]["method_options"].get(run["method"], {})
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
        cells[1] = "" if entry.kind == "bound" else cells[1]
        more, learned = (entry.beside.more, entry.beside.learned) if entry.beside else (None, None)
        reach = f"{learned[0]:.2f} to {learned[1]:.2f}" if learned else ""
        count = str(entry.scores["acc"].count)
        found.append([entry.name, entry.chosen, count, *cells, shown(more, "+.1f", 100.0), reach])
    return found


def sentence(runs: Sequence[Mapping[str, Any]]) -> str:
    """Who loses least at equal learning, by how much, whether that is sure, and what the pull has over its nulls."""
    rows = entries(runs)
    found = [entry for entry in rows if entry.beside is not None]
    gaps = {entry.name: entry.beside.more for entry in found if entry.beside and entry.beside.more}
    others = {name: more for name, more in gaps.items() if name not in NULLS}
    if not others:
        return "No two rows have curves yet that can be compared."
    best = min(others, key=lambda name: others[name].mean)
    more = others[best]
    by = shown(more, ".1f", 100.0).removeprefix("−")
    if more.half_width is None or abs(more.mean) <= more.half_width:
        text = f"`{OURS}` and `{best}` lose least at equal learning, and are not told apart ({by} points of the gain)."
    else:
        first, second = (OURS, best) if more.mean > 0 else (best, OURS)
        text = f"`{first}` loses least at equal learning, {by} points of the gain less than `{second}`."
    (own,) = (entry.scores["learned"].mean for entry in rows if entry.name == OURS)
    for less in (True, False):
        apart = [e for e in found if e.name not in gaps and e.rates > 1 and (e.scores["learned"].mean < own) == less]
        if apart:
            names = ", ".join(f"`{entry.name}`" for entry in apart)
            text += f" Not compared, as they learn {'less' if less else 'more'} at all rates: {names}."
    nulls = [f"{words} {shown(gaps[name], '.1f', 100.0)}" for name, words in NULLS.items() if name in gaps]
    return f"{text} Nulls of the pull lose more, in points: {', '.join(nulls)}." if nulls else text


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """The sentence and the rows."""
    return f"{sentence(runs)}\n\n{text_table(HEADER, rows(runs))}"
