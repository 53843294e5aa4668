"""Commands of `sparse-cl` in processes that are killed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence

from cases.forked import start

from sparse_cl.cli import main


def run(arguments: Sequence[str], seconds: float | None = None) -> bool:
    """Whether the command was killed, having run for so many seconds; if not, it has succeeded."""
    process = start(main, [*map(str, arguments)], TOKENIZERS_PARALLELISM="false")
    process.join(seconds)
    killed = process.is_alive()
    if killed:
        process.kill()
        process.join()
    else:
        assert process.exitcode == 0
    process.close()
    return killed


def undisturbed(*commands: Sequence[str]) -> float:
    """Runs commands one after the other, and returns how many seconds that took."""
    began = time.monotonic()
    for command in commands:
        run(command)
    return time.monotonic() - began


def killed(
    kills: int,
    whole: float,
    commands: Callable[[int], Sequence[Sequence[str]]],
    look: Callable[[int], object] = lambda chain: None,
) -> Iterator[int]:
    """Runs chains of commands, each command killed again and again until it is done; yields the number of each chain.

    Args:
        kills: how many there are at least.
        whole: seconds that a chain takes.
        commands: of the chain of a number.
        look: called with it after each kill.
    """
    moments, done, chain = random.Random(0), 0, 0
    while done < kills:
        for command in commands(chain):
            while done < kills and run(command, moments.uniform(0, whole)):
                done += 1
                look(chain)
            run(command)
        yield chain
        chain += 1
