"""The command line: `sparse-cl <command>`, also `python -m sparse_cl <command>`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .four_domains import command as four_domains
from .learn import command as learn
from .planner import command as planner
from .report import command as report


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
    learn.add_parser(commands)
    four_domains.add_parser(commands, _probe)
    report.add_parsers(commands)
    planner.add_parser(commands)
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        moved = "compare: finished runs are compared by `python -m benchmarks.arena compare DIR …`, in a checkout"
        print(f"sparse-cl: {moved} of sparse_cl", file=sys.stderr)
        return 2
    return run_command(parser, argv)


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse, and call what a command set as `command` with what was parsed; `main`'s exit status."""
    arguments = parser.parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _tell  # type: ignore[assignment]
            return arguments.command(arguments) or 0
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        from .four_domains.files import is_disk_full

        if not is_disk_full(error):
            raise
        said = f"a file could not be written ({error}); is the disk full?{_goes_on(arguments)}"
        print(f"{parser.prog}: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted{_goes_on(arguments)}", file=sys.stderr)
        return 130


def _goes_on(arguments: argparse.Namespace) -> str:
    return "; the same command goes on where it stopped" * getattr(arguments, "resumes", False)
