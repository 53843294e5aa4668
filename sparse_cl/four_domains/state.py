"""Bytes that a method keeps beside the model: its optimizer's state, and its own memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl.layout import part
from sparse_cl.methods import Method

MEASURING = "_before"
"""Attribute in which methods hold copies that only the report needs."""


def state_bytes(method: Method, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state (moments, masters, counts), and of the tensors that the method holds.

    The model's parameters do not count, nor do gradients, nor copies of weights that are held to measure the leak.
    """
    held = {(tensor.device, tensor.untyped_storage().data_ptr()): tensor for tensor in _tensors(method, set())}
    return optimizer_state_bytes(optimizer) + sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state tensors alone, as far as this process holds them."""
    if hasattr(optimizer, "state_bytes"):
        return optimizer.state_bytes()
    return sum(
        part(value).nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen or isinstance(value, (nn.Module, nn.Parameter, torch.optim.Optimizer)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part, seen)
    elif isinstance(value, (list, tuple, set)):
        for part in value:
            yield from _tensors(part, seen)
    elif isinstance(value, Method) or type(value).__module__.startswith(("sparse_cl.", "benchmarks.arena.")):
        for name, part in getattr(value, "__dict__", {}).items():
            if name != MEASURING:
                yield from _tensors(part, seen)
