"""Prompt and response as token ids, with labels on the response only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

IGNORED = -100
"""The label of a token that the loss leaves out (PyTorch's and transformers' convention)."""


@dataclass(frozen=True)
class Example:
    """One encoded record.

    Attributes:
        input_ids: prompt, a line break, response, end-of-sequence.
        labels: as long as `input_ids`; the token's id on the response and the end-of-sequence, else `IGNORED`.
        response_start: position of the first response token.
        response_end: position after the last response token, the end-of-sequence left out.
        response_bytes: UTF-8 bytes of the response, or of the part that the truncation kept.
    """

    input_ids: list[int]
    labels: list[int]
    response_start: int
    response_end: int
    response_bytes: int


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Ids of the prompt and the line break after it, with what the tokenizer puts before a text (BOS)."""
    ids = list(tokenizer(prompt + "\n")["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def encode(tokenizer: Any, prompt: str, response: str, max_length: int, separator: str = "") -> Example:
    """Encode one prompt and response to at most `max_length` ids.

    Too long a pair loses the *beginning* of the prompt (questions stand at its end), to no less than half of
    `max_length`; then the end of the response, and with it the end-of-sequence.

    Args:
        tokenizer: a fast tokenizer of `transformers` (one with character offsets).
        prompt, response: the texts.
        max_length: in tokens, at least 4.
        separator: text between prompt and response that is given, not scored.
    """
    if max_length < 4:
        raise ValueError(f"max_length must be at least 4 tokens, got {max_length}")
    prompt_ids = encode_prompt(tokenizer, prompt)
    if separator:
        prompt_ids += tokenizer(separator, add_special_tokens=False)["input_ids"]
    encoded = tokenizer(response, add_special_tokens=False, return_offsets_mapping=True)
    response_ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    room = max_length - min(len(prompt_ids), max_length // 2)
    kept = response
    if len(response_ids) + len(end) > room:
        if len(response_ids) > room:
            response_ids = response_ids[:room]
            kept = response[: offsets[room - 1][1]]
        end = []
    room = max_length - len(response_ids) - len(end)
    if len(prompt_ids) > room:
        has_bos = tokenizer.bos_token_id is not None and prompt_ids[0] == tokenizer.bos_token_id
        head = prompt_ids[:1] if has_bos else []
        prompt_ids = head + prompt_ids[len(prompt_ids) - room + len(head) :]
    start = len(prompt_ids)
    return Example(
        input_ids=prompt_ids + response_ids + end,
        labels=[IGNORED] * start + response_ids + end,
        response_start=start,
        response_end=start + len(response_ids),
        response_bytes=len(kept.encode()),
    )


class EncodedRecords(Dataset):
    """Records encoded when they are asked for; items are what `transformers`' Trainer and collators take."""

    def __init__(self, records: Sequence[dict], tokenizer: Any, max_length: int) -> None:
        self.records, self.tokenizer, self.max_length = records, tokenizer, max_length

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        record = self.records[index]
        example = encode(self.tokenizer, record["prompt"], record["response"], self.max_length)
        return {
            "input_ids": example.input_ids,
            "attention_mask": [1] * len(example.input_ids),
            "labels": example.labels,
        }


def pad(
    sequences: Sequence[Sequence[int]], value: int, device: torch.device | str = "cpu", *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences as one (batch, longest) int64 tensor filled up with `value`, and its attention mask."""
    side = "left" if left else "right"
    rows = [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)
