"""Many runs at once, and their comparison.

python -m benchmarks.arena sweep --order given,reverse --seed 0,1,2 --out DIR   # and the options of sparse-cl run
python -m benchmarks.arena compare DIR                                          # finished runs
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sparse_cl.cli import run_command
from sparse_cl.four_domains.command import add_run_options


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is as `sparse-cl`'s."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.arena", description="Comparisons of many runs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    several = commands.add_parser(
        "sweep",
        help="a run for each order and seed, and their comparison",
        description="Run `sparse-cl run` for each --order and each --seed (with commas between them), each in a folder "
        "OUT/<order>-seed<N>, and compare. What was stopped goes on with the same command.",
    )
    add_run_options(several)
    several.set_defaults(command=_sweep)
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
    return run_command(parser, argv)


def _sweep(arguments: argparse.Namespace) -> int:
    # transformers takes seconds to import: not for --help.
    from .sweep import sweep

    return sweep(arguments)


def _compare(arguments: argparse.Namespace) -> None:
    from .compare_report import compare

    out = arguments.out or arguments.folders[0]
    print(compare(arguments.folders, out))
    print(f"\nWritten to {out}: compare.txt, compare.json, pareto.png", flush=True)


if __name__ == "__main__":
    sys.exit(main())
