"""What is checked of records with the tokenizer, before a model is loaded; and examples for a person to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .chat import render
from .encoding import IGNORED, encode_record
from .records import DataError, Records

_TOGETHER = 1024
"""Records that are tokenized in one call."""
_SHOWN = 24
"""Tokens of the beginning and of the end of a stretch that are shown."""


def check_tokenizer(tokenizer: Any, rows: int) -> None:
    """Whether the token that fills up batches has a row in the embedding.

    Raises:
        DataError: it has none.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        raise DataError(_beyond("the tokenizer pads with", tokenizer, tokenizer.pad_token_id, rows))


def check_records(records: Sequence[dict], tokenizer: Any, rows: int, max_length: int) -> None:
    """Whether every record can be learned from by a model.

    Args:
        rows: of the model's input embedding (`config.vocab_size`).
        max_length: tokens that a record may have.

    Raises:
        DataError: a token has no row in the embedding, also the one that is padded with; nothing is left to learn of
            a record; or a chat template refuses it. File and line are named.
    """
    check_tokenizer(tokenizer, rows)
    for start in range(0, len(records), _TOGETHER):
        part = records[start : start + _TOGETHER]
        for number, suspect in enumerate(_suspects(part, tokenizer, rows), start):
            if suspect:
                _check_record(records[number], f"record {number}", tokenizer, rows, max_length)


def check_text(text: str, option: str, tokenizer: Any, rows: int) -> None:
    """Whether a plain text can be read by a model.

    Raises:
        DataError: it has fewer than two tokens, or one without a row in the embedding; `option` is named.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise DataError(f"{option}: the text is too short: {len(ids)} tokens, need at least 2")
    if max(ids) >= rows:
        raise DataError(_beyond(f"{option}: the text has", tokenizer, max(ids), rows))


def _suspects(records: Sequence[dict], tokenizer: Any, rows: int) -> list[bool]:
    """Which records may have a token without a row, or too few tokens: of whole texts together, as that is many times
    faster than to encode each record."""
    texts = [_texts(record, tokenizer) for record in records]
    how = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    given, learned = (tokenizer([pair[place] for pair in texts], **how)["input_ids"] for place in (0, 1))
    return [
        len(second) < 2 or max(second) >= rows or max(first, default=0) >= rows
        for first, second in zip(given, learned, strict=True)
    ]


def _texts(record: dict, tokenizer: Any) -> tuple[str, str]:
    """What is given and what is learned of a record; of a conversation all of it."""
    if "messages" in record:
        return "", render(tokenizer, record["messages"], getattr(record, "where", "a record")).text
    if "text" in record:
        return "", record["text"]
    return "\n".join([record["prompt"], *record.get("choices", ())]), record["response"]


def _check_record(record: dict, name: str, tokenizer: Any, rows: int, max_length: int) -> None:
    where = getattr(record, "where", name)
    example = encode_record(tokenizer, record, max_length)
    highest = max(example.input_ids, default=0)
    for choice in record.get("choices", ()):
        highest = max(highest, *tokenizer(choice, add_special_tokens=False)["input_ids"], 0)
    if highest >= rows:
        raise DataError(_beyond(f"{where}: its text has", tokenizer, highest, rows))
    if all(label == IGNORED for label in example.labels[1:]):
        field = next(field for field in ("messages", "text", "response") if field in record)
        raise DataError(
            f"{where}: nothing is left to learn of `{field}`: {len(example.input_ids)} tokens, of which none is "
            f"learned with another one before it (max_length {max_length}). Leave the record out"
        )


def show(records: Records, tokenizer: Any, max_length: int, count: int = 3) -> str:
    """What was taken, and `examples`."""
    return f"{records.describe()}\n{examples(records, tokenizer, max_length, count)}"


def examples(records: Sequence[dict], tokenizer: Any, max_length: int, count: int = 3) -> str:
    """The first `count` records token by token, as they are trained on.

    A | stands between tokens, « and » around those that are learned; a line break is shown as a backslash and an n.
    """
    lines: list[str] = []
    for number, record in enumerate(records[:count]):
        example = encode_record(tokenizer, record, max_length)
        learned = sum(label != IGNORED for label in example.labels)
        where = getattr(record, "where", f"record {number}")
        cut = ", cut to fit" * (len(example.input_ids) < len(encode_record(tokenizer, record, 10**9).input_ids))
        lines += ["", f"{where}: {len(example.input_ids)} tokens{cut}, {learned} of them (in «») are learned"]
        lines.append(_marked(tokenizer, example.input_ids, [label != IGNORED for label in example.labels]))
    return "\n".join(lines[1:])


def _marked(tokenizer: Any, ids: Sequence[int], learned: Sequence[bool]) -> str:
    stretches: list[tuple[bool, list[str]]] = []
    for token, before, is_learned in zip(ids, [None, *ids], learned, strict=False):
        if not stretches or stretches[-1][0] != is_learned:
            stretches.append((is_learned, []))
        stretches[-1][1].append(_piece(tokenizer, before, token).replace("\n", "\\n"))
    shown = []
    for is_learned, pieces in stretches:
        if len(pieces) > 2 * _SHOWN:
            left_out = f" … {len(pieces) - 2 * _SHOWN} tokens … "
            pieces = [*pieces[:_SHOWN], left_out, *pieces[-_SHOWN:]]
        shown.append(f"«{'|'.join(pieces)}»" if is_learned else "|".join(pieces))
    return "".join(shown)


def _piece(tokenizer: Any, before: int | None, token: int) -> str:
    """A token's text after the one before it: alone, a SentencePiece token loses the space that it begins with."""
    alone: str = tokenizer.decode([token])
    if before is None:
        return alone
    lead: str = tokenizer.decode([before])
    both: str = tokenizer.decode([before, token])
    return both[len(lead) :] if both.startswith(lead) and both.endswith(alone) else alone


def _beyond(what: str, tokenizer: Any, token: int, rows: int) -> str:
    return (
        f"{what} token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), and the embedding has {rows} rows. "
        "Resize it (model.resize_token_embeddings) and save the model, or take the tokenizer that belongs to it"
    )
