"""Plain text as batches of windows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_cl.four_domains import embedded
from sparse_cl.four_domains.encoding import pad
from sparse_cl.four_domains.experiment import read_text


def reference_text(path: str | None) -> str:
    """The beginning of a file; None: the embedded text. Errors as those of `read_text`."""
    return embedded.reference_text() if path is None else read_text(path, "--text")


def text_batches(tokenizer: Any, text: str, max_length: int, batch_size: int) -> list[dict[str, Tensor]]:
    """The text in windows of `max_length` tokens that do not overlap, the last one shorter.

    Returns:
        Batches of input_ids and attention_mask, (at most batch_size, at most max_length) int64.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    batches = []
    for start in range(0, len(windows), batch_size):
        padded, mask = pad(windows[start : start + batch_size], 0)
        batches.append({"input_ids": padded, "attention_mask": mask})
    return batches
