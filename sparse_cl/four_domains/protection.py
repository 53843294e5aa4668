"""The text whose knowledge methods that protect are to keep (`--protect`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparse_cl.data.encoding import text_windows
from sparse_cl.data.files import read_text
from sparse_cl.data.records import DataError

from . import embedded

EMBEDDED = "embedded"
WINDOWS = 128
"""Windows of the text that a method is given."""
_SEED, _LINES = 1, 4000
_BYTES_A_TOKEN = 16
"""More than a token of text has, so that reading this many is enough and a long file is not read whole."""


def in_windows(tokenizer: Any, text: str, max_length: int, most: int = WINDOWS) -> list[dict[str, list[int]]]:
    """A text in windows (`text_windows`): items as those of `EncodedRecords`, every token a label.

    Args:
        tokenizer: of `transformers`.
        max_length: tokens a window; what is left at the end is dropped, unless it is all there is.
        most: windows there are, from the beginning.

    Raises:
        ValueError: fewer than two tokens.
    """
    found = [window.input_ids for window in text_windows(tokenizer, text, max_length)]
    if not found or len(found[0]) < 2:
        raise ValueError(f"the text is too short: {sum(map(len, found))} tokens, need at least 2")
    whole = [ids for ids in found if len(ids) == max_length] or found
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in whole[:most]]


def text_to_protect(path: str | None, reference: str | None, scored: str | None, max_length: int) -> str | None:
    """The text to protect, or None where none is asked for.

    Args:
        path: a file of plain text, or "embedded": text of the embedded model's pretraining distribution, without the
            lines of the embedded text that is scored.
        reference: path of the text that is scored, if it is a file.
        scored: the text that is scored.

    Raises:
        DataError: the file is the one that is scored, holds the same text, or cannot be read.
    """
    if path is None:
        return None
    if path == EMBEDDED:
        held_out = set(embedded.reference_text().splitlines())
        return "\n".join(line for line in embedded.reference_text(_SEED, _LINES).splitlines() if line not in held_out)
    if reference is not None and Path(path).resolve() == Path(reference).resolve():
        raise DataError(f"--protect {path}: this is the text that --reference scores; protect another one")
    text = read_text(path, "--protect", WINDOWS * max_length * _BYTES_A_TOKEN)
    if scored is not None and (text.startswith(scored) or scored.startswith(text)):
        raise DataError(f"--protect {path}: it begins with the text that is scored; protect another one")
    return text
