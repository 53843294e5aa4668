"""The few training records that a method may look at, taken from somebody else's loader without disturbing it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SubsetRandomSampler

from sparse_cl.models.passes import IGNORED


class Looking:
    """Batches of at most `records` records, iterated over afresh each time, as methods take them.

    A map-style data set, or a list of batches, is read at evenly spaced places, of a stream the first records are. The
    loader itself is not iterated over, where it has a data set: its order and its random numbers are training's.

    Args:
        loader: a DataLoader, or any iterable of batches that can be iterated over more than once.
        model: on whose device the batches are.
    """

    def __init__(self, loader: Iterable[Any], model: nn.Module, records: int) -> None:
        if records < 1:
            raise ValueError(f"records: expected at least 1, got {records}")
        self.loader, self.model, self.records = loader, model, records

    def check(self) -> None:
        """Whether the data can be looked at.

        Raises:
            ValueError: they can be iterated over once only, and training needs that; or they make no batches.
        """
        loader: Any = self.loader
        data = getattr(loader, "dataset", loader)
        if not _is_indexed(data) and iter(data) is iter(data):
            raise ValueError(
                "loader: its data can be iterated over once only, so that what the method looks at would be missing in "
                "training; give data that begin anew at each iter()"
            )
        with untouched_random():
            for batch in itertools.islice(self._batches(), 1):
                as_batch(batch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        device = next(self.model.parameters()).device
        with untouched_random():
            batches = list(self._batches())
        if not batches:
            raise ValueError("loader: expected at least one batch, got none; is the data set empty?")
        for batch in batches:
            yield {name: part.to(device) for name, part in as_batch(batch).items()}

    def _batches(self) -> Iterator[Any]:
        loader: Any = self.loader
        data, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
        if data is None or collate is None:
            yield from self._enough(self._spread(loader) if _is_indexed(loader) else loader)
            return
        batches = getattr(loader, "batch_sampler", None)
        size = getattr(loader, "batch_size", None) or getattr(batches, "batch_size", None)
        if size is None and batches is None:
            # Its items are batches already.
            ready: Iterable[Any] = (data[key] for key in loader.sampler) if _is_indexed(data) else data
            yield from self._enough(collate(item) for item in ready)
            return
        if _is_indexed(data):
            sampler = getattr(batches, "sampler", None) or getattr(loader, "sampler", None)
            # A subset's: what it leaves out is not trained on.
            chosen = sampler.indices if isinstance(sampler, SubsetRandomSampler) else range(len(data))
            count = min(self.records, len(chosen))
            items: Iterator[Any] = (data[chosen[i * len(chosen) // count]] for i in range(count))
        else:
            items = itertools.islice(iter(data), self.records)
        while batch := list(itertools.islice(items, size or 1)):
            yield collate(batch)

    def _spread(self, batches: Any) -> Iterator[Any]:
        """As many as hold enough records, if all are as large as the first."""
        count = min(len(batches), -(-self.records // max(1, _size(batches[0])))) if len(batches) else 0
        return (batches[i * len(batches) // count] for i in range(count))

    def _enough(self, batches: Iterable[Any]) -> Iterator[Any]:
        seen = 0
        for batch in batches:
            yield batch
            seen += _size(batch)
            if seen >= self.records:
                return


def _size(batch: Any) -> int:
    """Records of a batch."""
    return len(next(iter(batch.values()))) if isinstance(batch, Mapping) else len(batch)


def _is_indexed(data: Any) -> bool:
    return isinstance(data, Sized) and hasattr(data, "__getitem__")


def as_batch(batch: Any) -> dict[str, Tensor]:
    """input_ids, labels and, where there are any, attention_mask and position_ids (by which packed records are told
    apart), of what trainers' collators make.

    Where there are no labels the completion's tokens are (TRL's `completion_mask`), or else all.

    Raises:
        ValueError: no input_ids.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        what = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"loader: expected batches with input_ids, got {what}; give a collator that makes them")
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    labels = batch.get("labels")
    if labels is None:
        counted = batch.get("completion_mask", mask)
        labels = ids if counted is None else ids.masked_fill(counted == 0, IGNORED)
    besides = {name: batch[name] for name in ("attention_mask", "position_ids") if batch.get(name) is not None}
    return {"input_ids": ids, "labels": labels, **besides}


@contextmanager
def untouched_random() -> Iterator[None]:
    """Random numbers go on afterwards as if nothing had been drawn."""
    import numpy

    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
