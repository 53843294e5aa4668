"""Records as token ids, with labels on what is learned of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from .chat import Turns, render
from .records import Record

IGNORED = -100
"""The label of a token that the loss leaves out (PyTorch's and transformers' convention)."""
_CONTENT, _ENDING = 1, 2
Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """One encoded record.

    Attributes:
        input_ids: token ids.
        labels: as long as `input_ids`; the token's id where it is learned, else `IGNORED`.
        spans: (first, end) positions of what is scored: the learned tokens without those that end a turn or the text.
        scored_bytes: UTF-8 bytes of the text that is scored, or of the part that the truncation kept.
    """

    input_ids: list[int]
    labels: list[int]
    spans: tuple[Span, ...]
    scored_bytes: int


def encode_prompt(tokenizer: Any, prompt: str, max_length: int | None = None) -> list[int]:
    """Ids of the prompt and the line break after it, with what the tokenizer puts before a text (BOS).

    Args:
        max_length: in tokens; too long a prompt loses its beginning, as in `encode`. None: any.
    """
    ids = _with_bos(tokenizer, prompt + "\n")
    if max_length is None or len(ids) <= max_length:
        return ids
    head = _head(tokenizer, ids)
    return ids[:head] + ids[len(ids) - max_length + head :]


def encode(tokenizer: Any, prompt: str, response: str, max_length: int, separator: str = "") -> Example:
    """Encode prompt, a line break, response and end-of-sequence to at most `max_length` ids.

    Too long a pair loses the *beginning* of the prompt (questions stand at its end), to no less than half of
    `max_length`; then the end of the response, and with it the end-of-sequence.

    Args:
        tokenizer: of `transformers`.
        prompt, response: the texts.
        max_length: in tokens, at least 4.
        separator: text between prompt and response that is given, not scored.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    if separator:
        prompt_ids += tokenizer(separator, add_special_tokens=False)["input_ids"]
    response_ids, ends = tokenized(tokenizer, response)
    whole, start = prompt_ids + response_ids + _end(tokenizer), len(prompt_ids)
    places = _kept(tokenizer, whole, start, max_length)
    ids = [whole[place] for place in places]
    begin = sum(place < start for place in places)
    kept = min(len(response_ids), len(ids) - begin)
    return Example(ids, [IGNORED] * begin + ids[begin:], ((begin, begin + kept),), ends(kept))


def encode_text(tokenizer: Any, text: str, max_length: int, *, ends_here: bool = True) -> Example:
    """Encode a text of which every token is learned, between what the tokenizer puts before it (BOS) and an
    end-of-sequence, unless it goes on elsewhere; too long a text loses its end."""
    plain, ends = tokenized(tokenizer, text)
    whole = _with_bos(tokenizer, text)
    ids = [*whole, *(_end(tokenizer) if ends_here else ())][:max_length]
    start, end = len(whole) - len(plain), min(len(whole), max_length)
    # The first id of all has no prediction: without a BOS it goes unscored, and so do its bytes.
    first = max(start, 1)
    scored = ends(max(0, end - start)) - ends(first - start)
    return Example(ids, list(ids), ((first, max(first, end)),), max(0, scored))


def text_windows(tokenizer: Any, text: str, max_length: int) -> list[Example]:
    """A text in consecutive windows of `max_length` ids, the last one shorter, of which every token is learned.

    Each begins with what the tokenizer puts before a text (BOS): without it, a model that was trained with it hardly
    reads what follows. Without a BOS the first token of a window is not scored, nor are its bytes.
    """
    plain, ends = tokenized(tokenizer, text)
    whole = _with_bos(tokenizer, text)
    head = whole[: len(whole) - len(plain)]
    room, first, found = max_length - len(head), max(len(head), 1), []
    for start in range(0, len(plain), room):
        ids = [*head, *plain[start : start + room]]
        begin = start - len(head)  # of the window's first id, in the text
        scored = ends(begin + len(ids)) - ends(begin + first)
        found.append(Example(ids, list(ids), ((first, len(ids)),), scored))
    return found


def encode_messages(tokenizer: Any, record: Record | dict, max_length: int) -> Example:
    """Encode a conversation by the tokenizer's chat template; the assistant's turns are learned, each with what ends
    it.

    Too long a conversation loses the beginning of what stands before the first turn that is learned, to no less than
    half of `max_length`; then its end.

    Raises:
        DataError: see `render`.
    """
    turns = render(tokenizer, record["messages"], getattr(record, "where", "a record"))
    pieces = _tokens_of(tokenizer, turns)
    ids, roles = [token for token, _ in pieces], [role for _, role in pieces]
    if turns.spans[-1][1] == turns.spans[-1][2] == len(turns.text):  # a template that does not end its turns
        ids, roles = ids + _end(tokenizer), roles + [_ENDING] * len(_end(tokenizer))
    kept = _kept(tokenizer, ids, next((i for i, role in enumerate(roles) if role), len(ids)), max_length)
    # The first id of all has no prediction.
    scored = [place for place, index in enumerate(kept) if place and roles[index] == _CONTENT]
    starts = [place for place, before in zip(scored, [-1, *scored], strict=False) if place != before + 1]
    ends = [place + 1 for place, after in zip(scored, [*scored[1:], -1], strict=False) if place != after - 1]
    if len(scored) == roles.count(_CONTENT):
        content = "".join(turns.text[begin:end] for begin, end, _ in turns.spans)
    else:
        content = tokenizer.decode([ids[kept[place]] for place in scored])
    return Example(
        input_ids=[ids[index] for index in kept],
        labels=[ids[index] if roles[index] else IGNORED for index in kept],
        spans=tuple(zip(starts, ends, strict=True)),
        scored_bytes=len(content.encode()),
    )


def encode_record(tokenizer: Any, record: Record | dict, max_length: int) -> Example:
    """Encode a normalised record of any format."""
    if "messages" in record:
        return encode_messages(tokenizer, record, max_length)
    if "text" in record:
        return encode_text(tokenizer, record["text"], max_length, ends_here=not record.get("goes_on"))
    return encode(tokenizer, record["prompt"], record["response"], max_length)


class EncodedRecords(Dataset):
    """Records encoded when they are asked for; items are what `transformers`' Trainer and collators take.

    Args:
        records: `Records`, or dicts in the form of one (`sparse_cl.data.records`).
        tokenizer: of `transformers`.
        max_length: tokens that a record may have.
    """

    def __init__(self, records: Sequence[dict], tokenizer: Any, max_length: int) -> None:
        self.records, self.tokenizer, self.max_length = records, tokenizer, max_length

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        example = encode_record(self.tokenizer, self.records[index], self.max_length)
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


def tokenized(tokenizer: Any, text: str) -> tuple[list[int], Callable[[int], int]]:
    """Ids of a text without special tokens, and how many of its UTF-8 bytes its first k tokens hold.

    Of a tokenizer without character offsets ("slow") the bytes are those of what it decodes.
    """
    ids, offsets = tokenized_with_offsets(tokenizer, text)

    def ends(count: int) -> int:
        if count >= len(ids):
            return len(text.encode())
        if offsets is None:
            return len(tokenizer.decode(ids[:count]).encode())
        return len(text[: offsets[count - 1][1] if count else 0].encode())

    return ids, ends


def tokenized_with_offsets(tokenizer: Any, text: str) -> tuple[list[int], list[Span] | None]:
    """Ids of a text without special tokens, and the characters of each; None: the tokenizer cannot say."""
    how = {"add_special_tokens": False, "verbose": False}
    try:
        encoded = tokenizer(text, return_offsets_mapping=True, **how)
    except NotImplementedError:
        encoded = tokenizer(text, **how)
    return list(encoded["input_ids"]), encoded.get("offset_mapping")


def _with_bos(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _head(tokenizer: Any, ids: Sequence[int]) -> int:
    """How many ids stand before a text: a BOS, which a truncation keeps."""
    return int(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)


def _kept(tokenizer: Any, ids: Sequence[int], start: int, max_length: int) -> list[int]:
    """Positions of the ids that a truncation keeps, where what is learned begins at `start`; see `encode`."""
    if max_length < 4:
        raise ValueError(f"max_length must be at least 4 tokens, got {max_length}")
    rest = min(len(ids) - start, max_length - min(start, max_length // 2))
    room = max_length - rest
    if start <= room:
        return list(range(start + rest))
    head = _head(tokenizer, ids)
    return [*range(head), *range(start - room + head, start + rest)]


def _tokens_of(tokenizer: Any, turns: Turns) -> list[tuple[int, int]]:
    """(id, 0, or `_CONTENT` or `_ENDING` where it is learned) of each token of a conversation."""
    cuts = [0, *(place for span in turns.spans for place in span), len(turns.text)]
    roles = [0, *(_CONTENT, _ENDING, 0) * len(turns.spans)]
    found: list[tuple[int, int]] = []
    ids, offsets = tokenized_with_offsets(tokenizer, turns.text)
    if not turns.special and offsets is not None:
        for token, (begin, end) in zip(ids, offsets, strict=True):
            # A token on a border belongs to what is learned: a space before an answer is in its first token.
            over = [role for role, a, b in zip(roles, cuts, cuts[1:], strict=False) if begin < b and a < end]
            found.append((token, next((role for role in over if role), 0)))
        return found
    for role, begin, end in zip(roles, cuts, cuts[1:], strict=False):
        part = turns.text[begin:end]
        ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] if part else []
        if turns.special and part and not begin:
            whole = _with_bos(tokenizer, part)
            found += [(token, 0) for token in whole[: len(whole) - len(ids)]]
            ids = whole[len(whole) - len(ids) :]
        found += [(token, role) for token in ids]
    return found
