"""The first lines of a report: which method forgot least without learning less, how much, and at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ENOUGH = 0.95
"""Share of adamw's gain below which little forgetting says nothing: not learning is the cheapest way not to forget."""
YARDSTICKS = ("adamw", "lora")


@dataclass(frozen=True)
class Outcome:
    """A row of a table, as far as the verdict needs it; means where there are several seeds.

    Attributes:
        name: as it stands in the table.
        method, kind: of the method; a "bound" is never named as the best.
        learned, forgetting: in bits per byte (see `metrics.FORMULAS`); forgetting is None with one domain.
        gain_lost: a share.
        costs: of `COSTS`, None where it is not known.
    """

    name: str
    method: str
    kind: str
    learned: float
    forgetting: float | None
    gain_lost: float | None
    costs: Mapping[str, float | None]


COSTS = {
    "step_seconds": "time of a step",
    "peak_memory_bytes": "peak memory",
    "state_bytes": "state kept beside the model",
}


def verdict(rows: Sequence[Outcome]) -> list[str]:
    """Sentences, a line each; none where nothing could be forgotten."""
    rows = [row for row in rows if row.kind != "bound" and row.forgetting is not None]
    if not rows:
        return []
    # Of several adamws, or loras, the one that learned most.
    yardsticks = {
        name: max(having, key=lambda row: row.learned)
        for name in YARDSTICKS
        if (having := [row for row in rows if row.method == name])
    }
    adamw = yardsticks.get("adamw")
    others = [row for row in rows if row.method != "adamw"]
    if adamw is None or adamw.learned <= 0:
        best = _least(rows)
        why = "adamw was not run" if adamw is None else "adamw learned nothing"
        lines = [
            f"{best.name} forgot least: {_forgot(best)}. How much it should have learned is not known, since {why}; it "
            f"learned {best.learned:.3f} bits/byte."
        ]
    elif not others:
        return [f"adamw alone was run: it forgot {_forgot(adamw)}."]
    else:
        best, lines = _next_to_adamw(adamw, others)
    if costs := _times(best, [row for row in yardsticks.values() if row is not best]):
        lines.append(f"What {best.name} costs: {costs}.")
    return lines


def _next_to_adamw(adamw: Outcome, others: Sequence[Outcome]) -> tuple[Outcome, list[str]]:
    """The best of the others, and why it is."""
    able = [row for row in others if row.learned >= ENOUGH * adamw.learned]
    if not able:
        best, fewest = max(others, key=lambda row: row.learned), _least(others)
        lines = [
            f"No method but adamw learned at least {ENOUGH:.0%} of adamw's gain. {best.name} came nearest with "
            f"{best.learned / adamw.learned:.0%} and forgot {_forgot(best)}; {adamw.name} forgot {_forgot(adamw)}."
        ]
        if fewest is not best:
            share = fewest.learned / adamw.learned
            lines.append(f"{fewest.name} forgot least, {_forgot(fewest)}, with {share:.0%} of that gain.")
        return best, lines
    best = _least(able)
    lines = [
        f"{best.name} forgot least of the methods that learned at least {ENOUGH:.0%} of adamw's gain: {_forgot(best)}, "
        f"having learned {best.learned / adamw.learned:.0%}; {adamw.name} forgot {_forgot(adamw)}."
    ]
    ours = [row for row in able if row.kind == "ours"]
    if best.kind != "ours" and ours:
        own = _least(ours)
        lines.append(f"Of ours, {own.name} forgot least: {_forgot(own)}.")
    return best, lines


def _least(rows: Sequence[Outcome]) -> Outcome:
    return min(rows, key=lambda row: row.forgetting or 0.0)


def _forgot(row: Outcome) -> str:
    share = "" if row.gain_lost is None else f", {row.gain_lost:.1%} of its gain"
    return f"{row.forgetting:.3f} bits/byte{share}"


def _times(row: Outcome, others: Sequence[Outcome]) -> str:
    """What a row costs, in multiples of what others cost."""
    parts = []
    for cost, words in COSTS.items():
        ratios = [
            f"{own / theirs:.2f} times {other.name}'s"
            for other in others
            if (own := row.costs.get(cost)) is not None and (theirs := other.costs.get(cost))
        ]
        if ratios:
            parts.append(f"{words} {' and '.join(ratios)}")
    return "; ".join(parts)
