"""Many runs or models at once, and their comparison.

python -m benchmarks.arena sweep --order given,reverse --seed 0,1,2 --out DIR   # and the options of sparse-cl run
python -m benchmarks.arena compare DIR                                          # finished runs
python -m benchmarks.arena run STUDY --models DIR --data DIR --out DIR          # a study of grids.py; it resumes
python -m benchmarks.arena table STUDY                                          # from the results that are kept
python -m benchmarks.arena trace --model MODEL --data DIR --out DIR             # TRACE's eight tasks; docs/trace.md
python -m benchmarks.arena scale --model A B C --out DIR                        # and the options of sparse-cl probe
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sparse_cl.arguments import add_options
from sparse_cl.cli import run_command
from sparse_cl.four_domains.command import add_run_options
from sparse_cl.report.settings import Out, ProbeSettings

from . import trace


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is as `sparse-cl`'s."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.arena", description="Many runs or models, compared.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    several = commands.add_parser(
        "sweep",
        help="a run for each order and seed, and their comparison",
        description="Run `sparse-cl run` for each --order and each --seed (with commas between them), each in a folder "
        "OUT/<order>-seed<N>, and compare. What was stopped goes on with the same command.",
    )
    add_run_options(several)
    several.set_defaults(command=_sweep, resumes=True)
    finished = commands.add_parser(
        "compare",
        help="many runs in one table, with means and intervals over seeds",
        description="Read the results of sparse-cl run in and under the folders, and make one table and one picture: "
        "means and 95 % intervals over seeds, a row for each method and its settings, orders apart and together.",
    )
    finished.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="outputs of sparse-cl run, or above")
    finished.add_argument(
        "--out", type=Path, metavar="DIR", help="for compare.txt, compare.json and pareto.png (default: the first DIR)"
    )
    finished.set_defaults(command=_compare)
    family = commands.add_parser(
        "scale",
        help="what domains use of several models, compared by width",
        description="Run the probes of `sparse-cl probe` on several models, write a report on each, and one that sets "
        "overlap, gradient cosine and sparsity against their widths, with the exponents of a family.",
    )
    add_options(family, ProbeSettings)
    add_options(family, Out)
    family.set_defaults(command=_scale)
    study = commands.add_parser(
        "run",
        help="a study: the runs that are missing, and its file of results",
        description="Make the runs of a study that are not done, and write each into benchmarks/results/arena. What "
        "was stopped goes on with the same command; what is in that file is not run again on another machine either.",
    )
    study.add_argument("study", metavar="STUDY", help="by its name in grids.py")
    for name in ("models", "data", "out"):
        study.add_argument(f"--{name}", required=True, type=Path, metavar="DIR")
    study.add_argument("--part", default="1/1", metavar="I/N", help="every N-th run from the I-th, for N processes")
    study.set_defaults(command=_run, resumes=True)
    trace.add_parser(commands)
    table = commands.add_parser("table", help="a study's table, from the results that are kept")
    table.add_argument("study", metavar="STUDY", help="by its name in grids.py")
    table.set_defaults(command=_table)
    return run_command(parser, argv)


def _run(arguments: argparse.Namespace) -> None:
    from . import grid
    from .grids import STUDIES

    try:
        part, parts = map(int, arguments.part.split("/"))
    except ValueError:
        part = parts = 0
    if not 1 <= part <= parts:
        raise ValueError(f"--part: expected I/N with 1 <= I <= N, got {arguments.part}")
    if arguments.study not in STUDIES:
        raise ValueError(f"unknown study {arguments.study!r}; there are {', '.join(STUDIES)}")
    if not arguments.data.is_dir():
        raise ValueError(f"--data {arguments.data}: no such folder")
    study = STUDIES[arguments.study](arguments.models, arguments.data, arguments.out)
    found = grid.run(arguments.study, study, arguments.out / arguments.study, part - 1, parts)
    print(f"{len(found)} of {len(study)} runs are in {grid.KEPT}")


def _table(arguments: argparse.Namespace) -> None:
    from sparse_cl.four_domains.figures import draw_curves

    from . import ceiling, main_table, size
    from .compare import EveryRunFailed, comparable, gather_runs
    from .compare_report import to_text
    from .grid import KEPT, kept
    from .pareto import draw_pareto

    runs = kept(arguments.study)
    if arguments.study == "ceiling":
        ceiling.draw(runs, KEPT / "ceiling.png")
        print(ceiling.table(runs))
    elif arguments.study == "size":
        found = size.of_results()
        size.draw(found, KEPT / "size.png")
        print(size.table(found))
    elif arguments.study == "main":
        draw_pareto(main_table.pictured(runs), KEPT / "main.png", "gain_lost", "the domains after the first")
        print(main_table.table(runs))
    else:
        if arguments.study == "demo":
            draw_curves([run for run in runs if run["seed"] == 0], KEPT.parent / "demo.png")
        for alike in comparable(runs):
            settings = alike[0]["settings"]
            print(f"{len(alike[0]['domains'])} domains, {settings['steps']} steps each, {settings['model']}\n")
            try:
                compared = gather_runs((arguments.study, run) for run in alike)
                print(to_text(compared), end="\n\n")
                if arguments.study == "routed":
                    draw_pareto(compared, KEPT / f"{arguments.study}.png")
            except EveryRunFailed as error:
                print(error, end="\n\n")


def _sweep(arguments: argparse.Namespace) -> int:
    # transformers takes seconds to import: not for --help.
    from .sweep import sweep

    return sweep(arguments)


def _scale(arguments: argparse.Namespace) -> None:
    from .studies.scale import scale

    scale(arguments)


def _compare(arguments: argparse.Namespace) -> None:
    from .compare_report import compare

    out = arguments.out or arguments.folders[0]
    print(compare(arguments.folders, out))
    print(f"\nWritten to {out}: compare.txt, compare.json, pareto.png", flush=True)


if __name__ == "__main__":
    sys.exit(main())
