"""A stream of batches in which nobody says where a domain ends: watched, and remembered in part."""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl.probes.boundaries import BoundaryDetector

from .looking import as_batch
from .rewind import Rewind

_RECENT = 64
"""Batches that a boundary may be noticed too late by and still be put in the right place."""


class Stream:
    """The batches that a model is trained on. Of those of the present domain some are kept, drawn evenly, on the CPU.

    Args:
        model: called with `input_ids` by name, in training mode where it learns.
        detector: begins anew; it may have watched another training.
        records: about how many to keep.
        rewind: is kept at the state before the first batch that looked as if it were of a new domain, while it does.

    Attributes:
        step: how many steps have been taken; whoever counts them says so.
    """

    def __init__(
        self, model: nn.Module, detector: BoundaryDetector, records: int, rewind: Rewind | None = None
    ) -> None:
        self.detector, self.records, self.rewind, self.step = detector, records, rewind, 0
        detector.begin()
        self._random = random.Random(0)
        self._seen, self._kept = 0, list[tuple[int, dict[str, Tensor]]]()
        self._recent: deque[tuple[int, dict[str, Tensor]]] = deque(maxlen=_RECENT)
        self._start: int | None = None
        self._old = list[dict[str, Tensor]]()
        self._count = 0
        # A training that was interrupted leaves its stream, which goes with the callback: the hook must not keep it.
        own = weakref.proxy(self)
        self._handle = model.register_forward_pre_hook(lambda *batch: own._see(*batch), with_kwargs=True)
        weakref.finalize(self, self._handle.remove)

    @property
    def at_boundary(self) -> bool:
        """Whether a domain has ended since the last `split`."""
        return self._start is not None

    def split(self) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
        """Batches of the domain that ended, and those seen of the new one; from now on that is the present one."""
        assert self._start is not None, "there is a boundary"
        old, self._old = self._old, []
        new = [(number, batch) for number, batch in self._recent if number >= self._start]
        self._kept, self._count, self._start = new[: self._room(new[0][1])], len(new), None
        return old, [batch for _, batch in new]

    def present(self) -> list[dict[str, Tensor]]:
        """Batches that were kept of the present domain."""
        return [batch for _, batch in self._kept]

    def close(self) -> None:
        """Watches no more."""
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Numbers, lists and tensors; a boundary is dealt with before a state is asked for."""
        own = {"seen": self._seen, "count": self._count, "kept": self._kept, "recent": list(self._recent)}
        version, numbers, gauss = self._random.getstate()
        own |= {"random": [version, list(numbers), gauss], "detector": self.detector.state_dict()}
        return own if self.rewind is None else {**own, "rewind": self.rewind.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen, self._count, self._kept = state["seen"], state["count"], list(state["kept"])
        self._recent = deque(state["recent"], maxlen=_RECENT)
        version, numbers, gauss = state["random"]
        self._random.setstate((version, tuple(numbers), gauss))
        self.detector.load_state_dict(state["detector"])
        if self.rewind is not None and "rewind" in state:
            self.rewind.load_state_dict(state["rewind"])

    @torch._disable_dynamo  # or what is kept of batches is traced, anew for each
    def _see(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        # Gradient checkpointing recomputes blocks, not the model, so each batch comes once.
        if not (module.training and torch.is_grad_enabled()):
            return
        batch = {name: part.detach().cpu() for name, part in as_batch(kwargs).items()}
        mask = batch.get("attention_mask")
        if mask is not None and not mask.any():
            return
        self._recent.append((self._seen, batch))
        found = self.detector.update(batch["input_ids"], mask)
        # Of several boundaries within one step the first one counts.
        if self._start is None:
            self._keep(found or self.detector.warns)
            if found:
                # However late, the earliest of the recent batches is left to the old domain.
                self._start = max(self._seen - self.detector.start, self._recent[min(1, len(self._recent) - 1)][0])
                # Now: further batches of the step may take the places of these.
                self._old = self._before(self._kept) or self._before(self._recent)
        self._count += 1
        place = self._random.randrange(self._count)
        if len(self._kept) < self._room(batch):
            self._kept.append((self._seen, batch))
        elif place < len(self._kept):
            self._kept[place] = (self._seen, batch)
        self._seen += 1

    def _keep(self, suspects: bool) -> None:
        """Before the batch that was just looked at is trained on."""
        if self.rewind is None:
            return
        if not suspects:
            self.rewind.drop()
        elif self.rewind.step is None:
            self.rewind.take(self.step)

    def _before(self, batches: Iterable[tuple[int, dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
        assert self._start is not None
        return [batch for number, batch in batches if number < self._start]

    def _room(self, batch: Mapping[str, Tensor]) -> int:
        return max(1, self.records // len(batch["input_ids"]))
