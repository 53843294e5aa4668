"""A projected step: updates go into a scratch, are corrected there, and only then reach the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_cl.reference.precision import full_precision

from .plan import Plan
from .projection import Correction, Fitted, Layer

#: Entries of updates that are held at a time, if no single one is larger: 64 MB of float32.
TOGETHER = 1 << 24

#: Updates begin at multiples of this many entries, so that they can be accessed in any width.
_ALIGNMENT = 16


class Scratch:
    """One buffer for each device and dtype, as large as was reserved at most."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[torch.device, torch.dtype], int] = {}
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def reserve(self, device: torch.device, dtype: torch.dtype, entries: int) -> None:
        self._sizes[device, dtype] = max(entries, self._sizes.get((device, dtype), 0))

    def buffer(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The same tensor until more has been reserved."""
        key = device, dtype
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < self._sizes[key]:
            self._buffers.pop(key, None)
            buffer = self._buffers[key] = torch.empty(self._sizes[key], dtype=dtype, device=device)
        return buffer


class ProjectedCall:
    """The part of a call that is projected: its updates, which lie in the scratch, and their corrections."""

    def __init__(
        self, plan: Plan, projections: Sequence[Fitted], kept: Sequence[dict[str, Tensor]], buffer: Tensor
    ) -> None:
        self.buffer = buffer
        self.layers: list[Layer] = []
        starts, _ = starts_of([state.layout.entries for state in plan.packed])
        parts = zip(plan.params, projections, plan.packed, kept, starts, strict=True)
        for weight, projection, state, its_own, start in parts:
            update = buffer[start : start + state.layout.entries].view(state.layout.compact_shape)
            self.layers.append(Layer(projection, update, its_own, partial(state.wide, weight)))
        self.updates = [layer.update for layer in self.layers]
        by_kind: dict[tuple[type[Correction], Any], list[Layer]] = {}
        for layer in self.layers:
            by_kind.setdefault((layer.projection.correction, layer.projection.alike), []).append(layer)
        self.corrections = [kind(layers) for (kind, _), layers in by_kind.items()]


def starts_of(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where updates of these sizes begin in a scratch, and how many entries that takes."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return starts, end


def split(sizes: Sequence[int]) -> list[list[int]]:
    """Numbers of consecutive updates of these sizes that fit together into one scratch."""
    room = max([TOGETHER, *sizes])
    result: list[list[int]] = []
    end = room + 1
    for number, size in enumerate(sizes):
        size = -(-size // _ALIGNMENT) * _ALIGNMENT
        if end + size > room:
            result.append([])
            end = 0
        result[-1].append(number)
        end += size
    return result


@contextmanager
def products(device: torch.device, exact: bool) -> Iterator[None]:
    """The precision of a projection's products: without autocast, in TF32 where that is allowed, see `Fitted.exact`."""
    with full_precision(device) if exact else torch.autocast(device.type, enabled=False):
        yield
