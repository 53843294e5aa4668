"""Training data put together of several data sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset


class Mixture(Dataset):
    """Items of several data sets, in a given order.

    Args:
        datasets: where the items are.
        picks: for each item, which data set, and which of its items.
    """

    def __init__(self, datasets: Sequence[Dataset], picks: Sequence[tuple[int, int]]) -> None:
        self.datasets, self.picks = datasets, picks

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, index: int) -> Any:
        dataset, item = self.picks[index]
        return self.datasets[dataset][item]
