"""What a report shows of plasticity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparse_cl.report.section import Section, Table, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NOTE = (
    "The task: to memorise random responses to random prompts, with which nothing that was learned helps (as random "
    "labels in Lyle et al. 2023 and Dohare et al. 2024). Steps: of AdamW on all of the task, at a constant learning "
    "rate of {lr:g}, until the loss is at most {target:g} nats a token, at most {max_steps}. The null is the "
    "checkpoint before on the same tasks; the interval is the range over {seeds} tasks, which are few. A lower loss at "
    "the start, where random tokens were less unlikely, saves steps without being plasticity."
)


def section(record: Mapping[str, Any]) -> Section:
    """From `PlasticityChange.to_json()`."""
    before = record["before"]
    note = _NOTE.format(seeds=len(before["fits"]), **{key: before[key] for key in ("lr", "target", "max_steps")})
    return Section("Plasticity", _sentence(record), (_figure(record),), _table(record), note)


def _sentence(record: Mapping[str, Any]) -> str:
    before, after = record["before"], record["after"]
    count = len(before["fits"])
    text = (
        f"To fit a random task the model needs {_steps(before)} before and {_steps(after)} after (median and range of "
        f"{count} {'task' if count == 1 else 'tasks'})"
    )
    pairs = [tuple(_bounded(fit["steps"]) for fit in fits) for fits in zip(before["fits"], after["fits"], strict=True)]
    more, fewer = (sum(sign * (b - a) > 0 for a, b in pairs if (a, b) != (_NEVER, _NEVER)) for sign in (1, -1))
    verdict = (
        "plasticity was lost" if more == count else "plasticity was gained" if fewer == count else "no clear change"
    )
    return (
        f"{text}: more steps in {more} tasks, fewer in {fewer}, the same in {count - more - fewer}, so {verdict}; "
        f"after {before['fixed_steps']} steps the median loss is {before['median_loss']:.3f} before and "
        f"{after['median_loss']:.3f} after."
    )


_NEVER = float("inf")


def _bounded(steps: int | None) -> float:
    return _NEVER if steps is None else steps


def _steps(side: Mapping[str, Any]) -> str:
    low, high = (f"more than {side['max_steps']}" if x is None else str(x) for x in side["range_steps"])
    middle = side["median_steps"]
    span = low if low == high else f"{low} to {high}"
    return f"{f'{middle:g}' if middle is not None else 'more than ' + str(side['max_steps'])} steps ({span})"


def _figure(record: Mapping[str, Any]) -> Figure:
    figure, axes = new_figure(1, 1, width=7, height=3)
    axis = axes[0][0]
    for side, colour in (("before", "tab:blue"), ("after", "tab:orange")):
        for number, fit in enumerate(record[side]["fits"]):
            label = side if number == 0 else None
            axis.plot(fit["losses"], color=colour, linewidth=1.2, alpha=0.8, label=label)
    axis.axhline(record["before"]["target"], color="grey", linestyle=":", label="target")
    axis.set_ylim(0, None)
    axis.set_xlabel("optimizer step; a line a task", fontsize=8)
    axis.set_ylabel("loss of the task (nats a token)", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8)
    return figure


def _table(record: Mapping[str, Any]) -> Table:
    limit = f"> {record['before']['max_steps']}"
    fixed = record["before"]["fixed_steps"]
    header = ("task", "steps before", "after", "extra", f"loss after {fixed} steps, before", "after")
    rows = [
        (
            str(a["seed"]),
            limit if a["steps"] is None else str(a["steps"]),
            limit if b["steps"] is None else str(b["steps"]),
            "–" if extra is None else f"{extra:+d}",
            f"{a['loss_after']:.3f}",
            f"{b['loss_after']:.3f}",
        )
        for a, b, extra in zip(record["before"]["fits"], record["after"]["fits"], record["extra_steps"], strict=True)
    ]
    return Table(header, tuple(rows))
