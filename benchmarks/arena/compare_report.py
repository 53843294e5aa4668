"""What `python -m benchmarks.arena compare` writes: one table and one picture of many runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_cl.four_domains.evaluate import METRICS
from sparse_cl.four_domains.files import write_json
from sparse_cl.four_domains.report import IN_MEGABYTES, IN_MILLISECONDS, UNITS, legend, number, text_table
from sparse_cl.four_domains.verdict import COSTS, Outcome, verdict

from .compare import SCORES, Comparison, gather
from .curves import at_equal_learning, lines_over_rates
from .intervals import Interval
from .pareto import draw_pareto, name_of

DECIMALS_AND_SCALE = {
    "step_seconds": (1, IN_MILLISECONDS),
    "peak_memory_bytes": (0, IN_MEGABYTES),
    "state_bytes": (2, IN_MEGABYTES),
    "more": (1, 100.0),
}
HEADS = {
    "learning_accuracy": "learning acc.",
    "gain_lost": "gain lost",
    "reference_change": "reference text",
    "drift": "KL drift",
    "step_seconds": "step ms",
    "peak_memory_bytes": "peak MB",
    "state_bytes": "state MB",
}


def _cell(found: Interval | None, column: str) -> str:
    if found is None:
        return "-"
    decimals, scale = DECIMALS_AND_SCALE.get(column, (3, 1.0))
    half = "" if found.half_width is None else f" ±{number(found.half_width, decimals, scale)}"
    return number(found.mean, decimals, scale) + half


def outcomes(compared: Comparison, section: str) -> list[Outcome]:
    """What the verdict needs, of every row that has runs in the section."""
    found = []
    for row in compared.rows:
        means = {name: compared.get(row, section, name) for name in ("learned", "forgetting", "gain_lost", *COSTS)}
        known = {name: None if value is None else value.mean for name, value in means.items()}
        if known["learned"] is None:
            continue
        costs = {cost: known[cost] for cost in COSTS}
        scores = (known[name] for name in ("learned", "forgetting", "gain_lost"))
        found.append(Outcome(row.name, row.method, row.kind, *scores, costs))
    return found


def to_text(compared: Comparison) -> str:
    """The verdict, and a table for each metric and section."""
    parts = ["\n".join([*compared.failed, *verdict(outcomes(compared, compared.sections()[-1]))])]
    if compared.settings["split"] == "validation":
        parts.append("Scored on validation records, which are for choosing settings: no result.")
    shown: dict[str, None] = {}
    for metric in METRICS:
        columns = compared.columns(metric)
        shown |= dict.fromkeys(columns)
        for section in compared.sections() if columns else ():
            rows = []
            for row in compared.rows:
                cells = [compared.get(row, section, column, metric) for column in columns]
                count = cells[columns.index("learned")]
                if count is not None:
                    texts = (_cell(cell, column) for cell, column in zip(cells, columns, strict=True))
                    rows.append([row.name, row.kind, str(count.count), *texts])
            if rows:
                header = ("method", "kind", "seeds", *(HEADS.get(column, column) for column in columns))
                parts.append(f"{metric} ({UNITS[metric]}); {section}\n" + text_table(header, rows))
    parts.append(_at_equal_learning(compared))
    parts.append(
        "Means over seeds, ± half of a 95 % interval (Student's t). Over all orders a seed counts with its mean over\n"
        "the orders. Reference text: change in bits per byte. Intransigence is against the setting of `single` that\n"
        "learned most.\n" + legend([name for name in SCORES if name in shown])
    )
    return "\n\n".join(part for part in parts if part)


def _at_equal_learning(compared: Comparison) -> str:
    """What each line over rates loses more than the first one where both have learned the same; "": there is none."""
    rows = []
    for found in at_equal_learning(compared):
        ends = found.learned or (None, None)
        rows.append([found.name, _cell(found.more, "more"), *(number(end, 2) for end in (*ends, found.most))])
    if not rows:
        return ""
    first = name_of(lines_over_rates(compared)[0])
    header = ("method", "points lost more", "from", "to", "most")
    return (
        f"At equal learning, beside {first}: how much more of the gain is lost, in percentage points, mean over the\n"
        "learning that both reach (from … to) over their rates; most: learned at the best rate\n"
        + text_table(header, rows)
    )


def to_json(compared: Comparison) -> dict[str, Any]:
    """All numbers: row → section → metric → column → mean, half_width, count."""
    rows = []
    for row in compared.rows:
        sections = {}
        for section in compared.sections():
            by_metric = {
                metric: {
                    column: found.to_json()
                    for column in compared.columns(metric)
                    if (found := compared.get(row, section, column, metric))
                }
                for metric in METRICS
                if compared.columns(metric)
            }
            if any(by_metric.values()):
                sections[section] = by_metric
        seeds = {order: row.seeds(order) for order in compared.orders}
        own = {"name": row.name, "method": row.method, "kind": row.kind, "settings": row.settings}
        rows.append({**own, "seeds": seeds, "scores": sections})
    return {
        "verdict": verdict(outcomes(compared, compared.sections()[-1])),
        "settings": compared.settings,
        "failed": compared.failed,
        "rows": rows,
    }


def compare(folders: Sequence[Path], out: Path) -> str:
    """Compare the runs in and under the folders, write compare.txt, compare.json and pareto.png into `out`.

    Returns:
        The text.

    Raises:
        ValueError: there is no run, or some that cannot be compared; what differs is named.
    """
    compared = gather(folders)
    text = to_text(compared)
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.txt").write_text(text + "\n", encoding="utf-8")
    draw_pareto(compared, out / "pareto.png")
    write_json(out / "compare.json", to_json(compared))
    return text
