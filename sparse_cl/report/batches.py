"""What models read for probes: batches of domains and of plain text, and a bar that shows them pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from sparse_cl.data.encoding import EncodedRecords, pad, text_windows
from sparse_cl.data.files import read_text
from sparse_cl.four_domains import embedded
from sparse_cl.four_domains.domains import Domain
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
    """The records of each domain, from all of it, on the model's device.

    Args:
        split: "train" or "validation"; probes choose, so they never see a test.

    Raises:
        ValueError: `max_length` exceeds the model's context.
    """
    context = getattr(getattr(model, "config", None), "max_position_embeddings", max_length)
    if max_length > context:
        raise ValueError(f"max_length: expected at most the model's context of {context} tokens, got {max_length}")
    device = next(model.parameters()).device
    return {
        domain.name: DomainBatches(
            EncodedRecords(getattr(domain, split), tokenizer, max_length), batch_size, device, records
        )
        for domain in domains
    }


def reference_text(path: str | None) -> str:
    """The beginning of a file; None: the embedded text. Errors as those of `read_text`."""
    return embedded.reference_text() if path is None else read_text(path, "--text")


def text_batches(tokenizer: Any, text: str, max_length: int, batch_size: int) -> list[dict[str, Tensor]]:
    """The text in windows (`text_windows`).

    Returns:
        Batches of input_ids and attention_mask, (at most batch_size, at most max_length) int64.
    """
    windows = [window.input_ids for window in text_windows(tokenizer, text, max_length)]
    padded = [pad(windows[start : start + batch_size], 0) for start in range(0, len(windows), batch_size)]
    return [{"input_ids": rows, "attention_mask": mask} for rows, mask in padded]


class Shown:
    """Batches that move a bar each time that they pass; `what` is said beside it."""

    def __init__(self, batches: Iterable[Any], what: str, bar: tqdm) -> None:
        self.batches, self.what, self.bar = batches, what, bar

    def __iter__(self) -> Iterator[Any]:
        self.bar.set_description(self.what)
        for batch in self.batches:
            yield batch
            self.bar.update()
