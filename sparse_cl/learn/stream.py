"""Several domains one after the other in a call's records, where nobody says where one ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_cl.methods import Method
from sparse_cl.methods.carried import load_carried
from sparse_cl.optim.memory_adamw import MemoryAdamW
from sparse_cl.probes.boundaries import BoundaryDetector

from .settings import LearnSettings

ARGUMENTS = {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant_with_warmup"}
"""Of `TrainingArguments`: in the given order, and no domain at a lower rate than another."""


def check_stream(settings: LearnSettings, records: int, steps: int) -> None:
    """Whether domains can be found in so many records.

    Raises:
        ValueError: there are too few batches, or more steps than a pass over them has.
    """
    batches = -(-records // settings.batch_size)
    a_pass, warmup = -(-batches // settings.gradient_accumulation), BoundaryDetector().warmup
    seen = min(batches, steps * settings.gradient_accumulation)
    if seen <= warmup:
        given = f"stream: {records} records" if seen == batches else f"steps: {steps} of a stream"
        raise ValueError(
            f"{given} are {seen} batches of {settings.batch_size}; the first {warmup} are what a domain is known by, "
            "so no boundary could be found; take a smaller --batch-size or more --steps, or leave --stream out"
        )
    if steps > a_pass:
        raise ValueError(
            f"steps: expected at most the {a_pass} of one pass over a stream, got {steps}; a second one would count as "
            "further domains"
        )


def optimizer_of(method: Method, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The method's, without a memory: a checkpoint may be of a later domain, and the callback brings what it knows."""
    optimizer = method.make_optimizer(model, lr)
    assert isinstance(optimizer, MemoryAdamW)
    optimizer.set_memory(None)
    return optimizer


def domains_in(folder: Path, say: Callable[[str], object]) -> list[dict[str, Any]]:
    """The history's entries of the domains that the callback found; it leaves them in the trainer's folder."""
    carried = load_carried(folder)
    assert carried is not None, "the callback writes it when training ends"
    found = carried.domains
    steps = ", ".join(f"{entry['name']} ({entry['steps']} steps)" for entry in found)
    say(f"Found {len(found)} domain{'s' * (len(found) > 1)} in the stream: {steps}")
    return found
