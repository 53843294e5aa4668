"""Processes forked from one that has imported what takes longer to import than they take to run.

That one has not imported ``sparse_cl``, so that what an environment variable says of it is heard.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch

IMPORTED = (
    "matplotlib.backends.backend_agg",
    "peft",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(IMPORTED))


def start(target: Callable[..., int | None], *arguments: Any, threads: int = 1, **environment: str) -> BaseProcess:
    """Starts a process that exits with what ``target`` returns (None is 0).

    Args:
        target: found by its name, in a module that is imported once the environment is set.
        threads: of torch.
        environment: variables to set, beside those that were set when the first process was started.
    """
    process = _context.Process(target=_run, args=(pickle.dumps((target, arguments)), threads, environment))
    process.start()
    return process


def exit_code(*arguments: Any, **options: Any) -> int:
    """That of a process, started with these arguments of :func:`start`, when it has ended."""
    process = start(*arguments, **options)
    process.join()
    return process.exitcode


def _run(pickled: bytes, threads: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    # What was imported is never garbage: without this, half of a tiny run is collecting it.
    gc.freeze()
    torch.set_num_threads(threads)
    target, arguments = pickle.loads(pickled)
    raise SystemExit(target(*arguments))


def start_two(work: Callable[..., None], *arguments: Any) -> None:
    """Runs ``work(rank, *arguments)`` in two processes; raises what either raises."""
    torch.multiprocessing.start_processes(work, arguments, nprocs=2, start_method="forkserver")
