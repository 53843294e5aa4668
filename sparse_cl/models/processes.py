"""This process among those that a launcher started."""

from __future__ import annotations

import os

import accelerate
import torch
from accelerate.utils import parse_flag_from_env


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
