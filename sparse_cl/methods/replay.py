"""Experience replay: some of the training examples are earlier domains'."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from .adamw import AdamW
from .options import check_share


class Replay(AdamW):
    """AdamW, on training data of which a share is replaced by examples of all earlier domains.

    The number of examples, and so the order in which they come, is that of every other method; the old ones come at
    even distances in it, by turns from each earlier domain, so that a run that ends early has its share of them too.
    No example comes twice before all of its domain have come. Unlike every other method here it keeps old data.

    Args:
        share: of a domain's examples that are old ones; from the second domain on at least one is.
    """

    options = ("share",)

    def __init__(self, share: float) -> None:
        self.share = check_share("share", share, one=False)

    def training_data(self, number: int, datasets: Sequence[Dataset], seed: int) -> Dataset:
        if number == 0:
            return datasets[0]
        joined: ConcatDataset[Any] = ConcatDataset(datasets[: number + 1])
        starts = [0, *joined.cumulative_sizes]
        *old_lengths, length = (stop - start for start, stop in itertools.pairwise(starts))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        orders = [torch.randperm(old, generator=generator).tolist() for old in old_lengths]
        picks = list(range(starts[number], starts[number] + length))
        order, count = _trained_order(length, seed), max(1, round(self.share * length))
        first = float(torch.rand((), generator=generator, dtype=torch.float64))
        for turn in range(count):
            times, old = divmod(turn, number)
            picks[order[int((turn + first) * length / count)]] = starts[old] + orders[old][times % len(orders[old])]
        return Subset(joined, picks)


def _trained_order(length: int, seed: int) -> list[int]:
    """The order of the Trainer's first pass: that of accelerate's `SeedableRandomSampler`."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()


class Replay1(Replay):
    """Replay of 1 %."""

    name = "replay-1"

    def __init__(self, share: float = 0.01) -> None:
        super().__init__(share)


class Replay5(Replay):
    """Replay of 5 %."""

    name = "replay-5"

    def __init__(self, share: float = 0.05) -> None:
        super().__init__(share)
