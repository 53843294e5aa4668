"""A run for each order of the domains and each seed, and all of them compared."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_cl.four_domains import experiment
from sparse_cl.four_domains.command import settings_of
from sparse_cl.four_domains.report import comparison
from sparse_cl.four_domains.results import completed
from sparse_cl.four_domains.settings import Settings
from sparse_cl.report.around import probe_run

from .compare_report import compare


def runs_of(settings: Settings, orders: Sequence[str], seeds: Sequence[int], out: Path) -> dict[Path, Settings]:
    """The folder of each run and its settings: `out` itself where there is one order and one seed.

    Raises:
        ValueError: no order or seed, or one twice.
    """
    for name, given in (("order", orders), ("seed", seeds)):
        if not given or len(set(given)) < len(given):
            raise ValueError(f"--{name}: expected at least one, each once; got {', '.join(map(str, given)) or 'none'}")
    chosen = {out / f"{order}-seed{seed}": settings.arranged(order, seed) for order in orders for seed in seeds}
    if len({of.domains for of in chosen.values()}) < len(orders):
        raise ValueError(f"--order {','.join(orders)}: two of these are the same order of {','.join(settings.domains)}")
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


def sweep(arguments: argparse.Namespace) -> int:
    """The command; its exit status is 1 where a method failed."""
    runs = runs_of(settings_of(arguments), arguments.order, arguments.seed, arguments.out)
    records, compared = run_all(runs, arguments.out)
    failed = len(records) > len(completed(records))
    if not experiment.is_main_process():
        return int(failed)
    print(compared or comparison(records))
    print(f"\nWritten to {arguments.out}, and {len(runs)} {'run' if len(runs) == 1 else 'runs'} in it", flush=True)
    if arguments.probe and failed:
        print("Nothing was probed, since a method failed.")
    elif arguments.probe:
        for folder, settings in runs.items():
            print(*probe_run(settings, folder), sep="\n")
    return int(failed)
