"""This process among those that a launcher started."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import accelerate
import torch
from accelerate.utils import broadcast_object_list, parse_flag_from_env

_Found = TypeVar("_Found")


def processes() -> accelerate.PartialState:
    """What accelerate knows of them; on CPUs they find each other only where ACCELERATE_USE_CPU is set."""
    return accelerate.PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def check_processes() -> None:
    """Whether the processes that were started know of each other, and each has a device of its own.

    Raises:
        ValueError: they do not, and each would do all the work and write into the others' folders; or one process has
            several GPUs.
    """
    started, known = int(os.environ.get("WORLD_SIZE", 1)), processes().num_processes
    if started != known:
        raise ValueError(
            f"{started} processes were started (WORLD_SIZE), but accelerate knows of {known}; without GPUs set "
            "ACCELERATE_USE_CPU=1"
        )
    if known == 1 and torch.cuda.device_count() > 1:
        # The Trainer would split batches over copies of the model (nn.DataParallel), which methods do not see.
        raise ValueError(
            f"one process sees {torch.cuda.device_count()} GPUs; let it see one, CUDA_VISIBLE_DEVICES=0, or start one "
            f"for each: torchrun --nproc-per-node {torch.cuda.device_count()} -m sparse_cl run …"
        )


def by_first(action: Callable[[], _Found]) -> _Found:
    """Has the first process do something, and returns what it found in all of them; where it fails, all fail.

    All processes must call it.

    Args:
        action: what it returns is pickled.

    Raises:
        as `action`, in every process: none waits for one that is gone.
    """
    if processes().num_processes == 1:
        return action()
    told: list[Any] = [None, None]
    if processes().is_main_process:
        try:
            told[0] = action()
        except Exception as error:
            told[1] = error
    broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]
