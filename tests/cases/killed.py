"""Commands of `sparse-cl` in processes that are killed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from cases.forked import start

from sparse_cl.cli import main


def _now() -> bool:
    return True


def run(arguments: Sequence[str], seconds: float | None = None, begun: Callable[[], bool] = _now) -> bool:
    """Whether the command was killed, so many seconds after `begun` was true; if not, it has succeeded."""
    process = start(main, [*map(str, arguments)], TOKENIZERS_PARALLELISM="false")
    while process.is_alive() and not begun():
        process.join(0.02)
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
    late: Callable[[int], bool] = lambda chain: True,
) -> Iterator[int]:
    """Runs chains of commands, each command killed again and again until it is done; yields the number of each chain.

    Args:
        kills: how many there are at least.
        whole: seconds that a chain takes.
        commands: of the chain of a number.
        late: whether the chain has come so far that it has something to lose. Every other kill waits for it: by the
            clock alone all of them come early where the machine has become slow.
    """
    moments, done, chain = random.Random(0), 0, 0
    while done < kills:
        for command in commands(chain):
            while done < kills and run(command, moments.uniform(0, whole), partial(late, chain) if done % 2 else _now):
                done += 1
            run(command)
        yield chain
        chain += 1
