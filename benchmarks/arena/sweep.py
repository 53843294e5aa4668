"""A run for each order of the domains and each seed, and all of them compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparse_cl.four_domains import experiment
from sparse_cl.four_domains.results import completed
from sparse_cl.four_domains.settings import Settings

from .compare_report import compare

GIVEN, REVERSE = "given", "reverse"


def arranged(domains: Sequence[str], order: str) -> tuple[str, ...]:
    """Domains in another order.

    Args:
        domains: as `Settings.domains` has them.
        order: "given", "reverse", or the names with + between them.

    Raises:
        ValueError: names that are not those of the domains, each once.
    """
    if order == GIVEN:
        return tuple(domains)
    if order == REVERSE:
        return tuple(reversed(domains))
    entries = {entry.partition("=")[0]: entry for entry in domains}
    names = order.split("+")
    if sorted(names) != sorted(entries):
        raise ValueError(
            f"--order {order}: expected {GIVEN}, {REVERSE}, or all of {'+'.join(entries)} in another order"
        )
    return tuple(entries[name] for name in names)


def runs_of(settings: Settings, orders: Sequence[str], seeds: Sequence[int], out: Path) -> dict[Path, Settings]:
    """The folder of each run and its settings: `out` itself where there is one order and one seed.

    Raises:
        ValueError: no order or seed, or one twice.
    """
    for name, given in (("order", orders), ("seed", seeds)):
        if not given or len(set(given)) < len(given):
            raise ValueError(f"--{name}: expected at least one, each once; got {', '.join(map(str, given)) or 'none'}")
    arrangements = {order: arranged(settings.domains, order) for order in orders}
    if len(set(arrangements.values())) < len(orders):
        raise ValueError(f"--order {','.join(orders)}: two of these are the same order of {','.join(settings.domains)}")
    chosen = {
        out / f"{order}-seed{seed}": replace(settings, domains=arrangements[order], seed=seed)
        for order in orders
        for seed in seeds
    }
    return {out: next(iter(chosen.values()))} if len(chosen) == 1 else chosen


def run_all(runs: dict[Path, Settings], out: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Run them one after another; where there are several, compare them in `out`.

    Each goes on where it was stopped, and one that is finished is not run again.

    Returns:
        The runs' records, and the text of the comparison, None where there is one run (or none that did not fail).

    Raises:
        as `experiment.run`. All folders are checked before the first run.
    """
    for folder, settings in runs.items():
        experiment.check_folder(folder, settings)
    if len(runs) > 1 and out.is_dir() and (out / experiment.SETTINGS).is_file():
        raise experiment.FolderError(f"{out} holds a single run; several need another --out")
    records = [record for folder, settings in runs.items() for record in experiment.run(settings, folder)]
    if len(runs) == 1 or not completed(records) or not experiment.is_main_process():
        return records, None
    return records, compare(list(runs), out)
