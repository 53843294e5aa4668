"""Batches of domains for probes, and a bar that shows them pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from sparse_cl.four_domains.data import Domain
from sparse_cl.four_domains.encoding import EncodedRecords
from sparse_cl.four_domains.sequence import DomainBatches


def domain_batches(
    domains: Sequence[Domain],
    tokenizer: Any,
    model: nn.Module,
    *,
    records: int,
    batch_size: int,
    max_length: int,
    split: str = "train",
) -> dict[str, DomainBatches]:
    """The first records of each domain, on the model's device.

    Args:
        split: "train" or "validation"; probes choose, so they never see a test.
    """
    device = next(model.parameters()).device
    return {
        domain.name: DomainBatches(
            EncodedRecords(getattr(domain, split), tokenizer, max_length), batch_size, device, records
        )
        for domain in domains
    }


class Shown:
    """Batches that move a bar each time that they pass; `what` is said beside it."""

    def __init__(self, batches: Iterable[Any], what: str, bar: tqdm) -> None:
        self.batches, self.what, self.bar = batches, what, bar

    def __iter__(self) -> Iterator[Any]:
        self.bar.set_description(self.what)
        for batch in self.batches:
            yield batch
            self.bar.update()
