"""What a report shows of plasticity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparse_cl.report.section import Section, Table

from .drawing import label, new_figure

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
    note = _NOTE.format(seeds=len(record["before"]["fits"]), **record["before"])
    return Section("Plasticity", _sentence(record), (_figure(record),), _table(record), note)


def _sentence(record: Mapping[str, Any]) -> str:
    before, after = record["before"], record["after"]
    count = len(before["fits"])
    steps = [[math.inf if fit["steps"] is None else fit["steps"] for fit in side["fits"]] for side in (before, after)]
    more, fewer = sum(a < b for a, b in zip(*steps, strict=True)), sum(a > b for a, b in zip(*steps, strict=True))
    verdict = "no clear change"
    if count in (more, fewer):
        verdict = "plasticity was lost" if more else "plasticity was gained"
    return (
        f"To fit a random task the model needs {_steps(before)} before and {_steps(after)} after (median and range of "
        f"{count} {'task' if count == 1 else 'tasks'}): more steps in {more} tasks, fewer in {fewer}, the same in "
        f"{count - more - fewer}, so {verdict}; after {before['fixed_steps']} steps the median loss is "
        f"{before['median_loss']:.3f} before and {after['median_loss']:.3f} after."
    )


def _steps(side: Mapping[str, Any]) -> str:
    middle, low, high = (
        f"more than {side['max_steps']}" if steps is None else f"{steps:g}"
        for steps in (side["median_steps"], *side["range_steps"])
    )
    return f"{middle} steps ({low if low == high else f'{low} to {high}'})"


def _figure(record: Mapping[str, Any]) -> Figure:
    figure, ((axis,),) = new_figure(alone=7)
    for side, colour in (("before", "tab:blue"), ("after", "tab:orange")):
        for number, fit in enumerate(record[side]["fits"]):
            called = side if number == 0 else None
            axis.plot(fit["losses"], color=colour, linewidth=1.2, alpha=0.8, label=called)
    axis.axhline(record["before"]["target"], color="grey", linestyle=":", label="target")
    axis.set_ylim(0, None)
    label(axis, "optimizer step; a line a task", "loss of the task (nats a token)")
    axis.legend(fontsize=8)
    return figure


def _table(record: Mapping[str, Any]) -> Table:
    before, after = record["before"], record["after"]

    def steps(side: Mapping[str, Any]) -> list[str]:
        return [f"> {before['max_steps']}" if fit["steps"] is None else str(fit["steps"]) for fit in side["fits"]]

    def losses(side: Mapping[str, Any]) -> list[str]:
        return [f"{fit['loss_after']:.3f}" for fit in side["fits"]]

    return Table.of_columns(
        [
            ("task", [str(fit["seed"]) for fit in before["fits"]]),
            ("steps before", steps(before)),
            ("after", steps(after)),
            ("extra", ["–" if extra is None else f"{extra:+d}" for extra in record["extra_steps"]]),
            (f"loss after {before['fixed_steps']} steps, before", losses(before)),
            ("after", losses(after)),
        ]
    )
