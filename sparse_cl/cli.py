"""The command line: `sparse-cl <command>`, also `python -m sparse_cl <command>`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .four_domains import command as four_domains
from .planner import command as planner
from .report import command as studies


def _probe(settings: Any, out: Path) -> list[str]:
    # Imported where it is needed: with transformers, which takes seconds.
    from .report.around import probe_run

    return probe_run(settings, out)


def _tell(message: Warning | str, *_: object) -> None:
    """Beside progress bars, and without the line of code that a reader of warnings does not know."""
    from tqdm.auto import tqdm

    tqdm.write(f"Warning: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0; 1 where a method failed; 2 for input that cannot be used (why: stderr)."""
    parser = argparse.ArgumentParser(prog="sparse-cl", description="Continual learning in the room that is free.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    four_domains.add_parsers(commands, _probe)
    studies.add_parsers(commands)
    planner.add_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _tell
            return arguments.command(arguments) or 0
    except (ValueError, OSError) as error:
        print(f"sparse-cl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sparse-cl: interrupted; the same command goes on after the last finished domain", file=sys.stderr)
        return 130
