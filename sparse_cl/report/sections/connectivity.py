"""What a report shows of the losses between two checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from sparse_cl.report.section import Section, Table, span

from .drawing import label, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NOTE = (
    "Loss: mean −ln p of the answer tokens, nats, at θ(t) = (1 − t)·before + t·after. Barrier: largest loss above the "
    "straight line between the end losses (Frankle et al. 2020, linear mode connectivity); 0 is the null, a line "
    "without a barrier, and what lies between two points can be missed. Intervals are the even and the odd records "
    "alone, each an estimate of half of them."
)


def section(record: Mapping[str, Any]) -> Section:
    """From `Connectivity.to_json()`."""
    return Section("Losses between the checkpoints", _sentence(record), (_figure(record),), _table(record), _NOTE)


def _sentence(record: Mapping[str, Any]) -> str:
    domains = record["domains"]
    worse = [name for name, path in domains.items() if path["rise"] > 0]
    changes = ", ".join(f"{name} {path['losses'][0]:.3f} → {path['losses'][-1]:.3f}" for name, path in domains.items())
    text = f"The loss after is higher than before on {_some(worse, len(domains))} ({changes})"
    barred = {name: path for name, path in domains.items() if path["barrier"] > 0}
    if not barred:
        return f"{text}; at the {len(record['points'])} points of the line between there is no barrier for any domain."
    most, path = max(barred.items(), key=lambda item: item[1]["barrier"])
    halves = path["barrier_halves"]
    interval = f"; the halves give {span(halves)}" if halves else ""
    return (
        f"{text}; on the line between there is a barrier for {_some(barred, len(domains))}, the highest "
        f"{path['barrier']:.3f} nats for {most} at t = {path['barrier_at']:g}{interval}."
    )


def _some(names: Collection[str], count: int) -> str:
    return f"{', '.join(names)}, {len(names)} of {count}" if names else f"no domain of {count}"


def _figure(record: Mapping[str, Any]) -> Figure:
    figure, ((axis,),) = new_figure(height=3.2, alone=7)
    for number, (name, path) in enumerate(record["domains"].items()):
        axis.plot(record["points"], path["losses"], "o-", color=f"C{number}", markersize=4, label=name)
        ends = [path["losses"][0], path["losses"][-1]]
        straight = "straight line between the ends" if number == 0 else None
        axis.plot([0, 1], ends, ":", color=f"C{number}", linewidth=1, label=straight)
    axis.set_xticks(record["points"], ["before", *(f"{t:g}" for t in record["points"][1:-1]), "after"])
    label(axis, "t", "answer loss (nats a token)")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _table(record: Mapping[str, Any]) -> Table:
    paths = record["domains"].values()
    losses = [(f"t = {t:g}", [f"{path['losses'][i]:.3f}" for path in paths]) for i, t in enumerate(record["points"])]
    return Table.of_columns(
        [
            ("domain", list(record["domains"])),
            ("tokens", [str(path["tokens"]) for path in paths]),
            *losses,
            ("rise", [f"{path['rise']:+.3f}" for path in paths]),
            ("(halves)", [span(path["rise_halves"]) for path in paths]),
            ("barrier", [f"{path['barrier']:.3f}" for path in paths]),
            ("(halves)", [span(path["barrier_halves"]) for path in paths]),
        ]
    )
