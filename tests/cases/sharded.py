"""Checks that several processes make together, started once for all of them."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from .forked import exit_code

Check = Callable[[Path], None]


def start(work: Callable[..., None], processes: int, *arguments: object) -> int:
    """Runs ``work(rank, *arguments)`` in processes forked from one that has imported all; returns its exit code."""
    return exit_code(_fork, work, processes, *arguments)


def _fork(work: Callable[..., None], processes: int, *arguments: object) -> None:
    import torch._dynamo  # which DTensors bring, and which takes longer than all checks

    torch.multiprocessing.start_processes(work, arguments, nprocs=processes, start_method="fork")


def join(rank: int, processes: int, store: Path) -> None:
    """Begins the process group of gloo."""
    torch.set_num_threads(1)
    file = dist.FileStore(str(store), processes)
    dist.init_process_group("gloo", store=file, rank=rank, world_size=processes, timeout=timedelta(seconds=30))


def make_all(rank: int, processes: int, folder: Path, checks: dict[str, Check]) -> None:
    """Makes checks one after the other until one fails, and writes what became of them."""
    join(rank, processes, folder / "store")
    became = {}
    try:
        for name, check in checks.items():
            own = folder / name
            own.mkdir(exist_ok=True)
            dist.barrier()
            check(own)
            became[name] = "passed"
    except BaseException:
        became[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(became))


def outcomes(folder: Path, processes: int) -> list[dict[str, str]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
