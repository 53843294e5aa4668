"""What a report shows of the losses between two checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparse_cl.report.section import Section, Table, new_figure, span

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
    text = f"The loss after is higher than before on {_names(worse)}{_of(worse, domains)} ({changes})"
    barred = {name: path for name, path in domains.items() if path["barrier"] > 0}
    if not barred:
        return f"{text}; at the {len(record['points'])} points of the line between there is no barrier for any domain."
    most = max(barred, key=lambda name: barred[name]["barrier"])
    path = barred[most]
    halves = path["barrier_halves"]
    interval = f"; the halves give {min(halves):.3f} to {max(halves):.3f}" if halves else ""
    return (
        f"{text}; on the line between there is a barrier for {_names(list(barred))}{_of(barred, domains)}, the highest "
        f"{path['barrier']:.3f} nats for {most} at t = {path['barrier_at']:g}{interval}."
    )


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "no domain"


def _of(some: Sequence[str] | Mapping[str, Any], domains: Mapping[str, Any]) -> str:
    return f", {len(some)} of {len(domains)}" if some else f" of {len(domains)}"


def _figure(record: Mapping[str, Any]) -> Figure:
    figure, axes = new_figure(1, 1, width=7, height=3.2)
    axis = axes[0][0]
    for number, (name, path) in enumerate(record["domains"].items()):
        axis.plot(record["points"], path["losses"], "o-", color=f"C{number}", markersize=4, label=name)
        ends = [path["losses"][0], path["losses"][-1]]
        straight = "straight line between the ends" if number == 0 else None
        axis.plot([0, 1], ends, ":", color=f"C{number}" if number else "C0", linewidth=1, label=straight)
    axis.set_xticks(record["points"], ["before", *(f"{t:g}" for t in record["points"][1:-1]), "after"], fontsize=8)
    axis.set_xlabel("t", fontsize=8)
    axis.set_ylabel("answer loss (nats a token)", fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _table(record: Mapping[str, Any]) -> Table:
    points = record["points"]
    header = ("domain", "tokens", *(f"t = {t:g}" for t in points), "rise", "(halves)", "barrier", "(halves)")
    rows = [
        (
            name,
            str(path["tokens"]),
            *(f"{loss:.3f}" for loss in path["losses"]),
            f"{path['rise']:+.3f}",
            span(path["rise_halves"]),
            f"{path['barrier']:.3f}",
            span(path["barrier_halves"]),
        )
        for name, path in record["domains"].items()
    ]
    return Table(header, tuple(rows))
