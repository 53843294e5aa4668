"""Long texts, in pieces that a model can read at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .encoding import tokenized_with_offsets
from .records import Record, Records


def cut_texts(records: Records, tokenizer: Any, max_length: int) -> Records:
    """The records with each `text` that is longer than `max_length` tokens in consecutive pieces; others as they are.

    A piece leaves room for what the tokenizer puts before and after a text; only the last ends in an end-of-sequence. A
    tokenizer without character offsets cannot say where to cut: its texts lose their end.
    """
    found: list[Record] = []
    cut = False
    for record in records:
        offsets = tokenized_with_offsets(tokenizer, record["text"])[1] if "text" in record else None
        room = max(1, max_length - 2)
        if offsets is None or len(offsets) <= room:
            found.append(record)
            continue
        text, cut = record["text"], True
        starts = [offsets[place][0] for place in range(0, len(offsets), room)]
        for begin, end in zip(starts, [*starts[1:], len(text)], strict=True):
            if text[begin:end].strip():
                goes_on = {"goes_on": True} if text[end:].strip() else {}
                found.append(Record.at(record.where, text=text[begin:end], **goes_on))
    if not cut:
        return records
    pieces = f"in {len(found):,} pieces of at most {max_length} tokens"
    return replace(records, records=found, chosen=", ".join(filter(None, (records.chosen, pieces))))
