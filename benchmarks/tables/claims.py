"""Sentences of README and docs that hold measured numbers, beside the numbers as the results have them."""

from __future__ import annotations

import re

from . import headlines, ideas

_NO_PROSE = re.compile(r"<!-- table: .*?<!-- end -->|```.*?```|`[^`]*`|(?<=\])\([^)]*\)", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.,−+-])[−+-]?(?:\d*\.\d+(?!\.?\d|e-)|\d+(?= %)|[\d.]+e-\d+)")


def claims() -> list[tuple[str, str]]:
    """Document and sentence; a line may end at any space of it."""
    of_documents = (*headlines.SENTENCES.items(), *ideas.SENTENCES.items())
    return [(document, sentence()) for document, sentences in of_documents for sentence in sentences]


def stands_in(sentence: str, text: str) -> bool:
    """Whether a document has the sentence, and no number goes on at its ends."""
    return re.search(rf"(?<![\d.]){re.escape(_on_one_line(sentence))}(?!\.?\d)", _on_one_line(text)) is not None


def unclaimed(name: str, text: str) -> list[str]:
    """Numbers of a document's prose and of its tables by hand that look measured and stand in no claim.

    Args:
        name: of the document, as in `claims`.
    """
    left = _on_one_line(_NO_PROSE.sub(" ", text))
    for document, sentence in claims():
        if document == name:
            left = left.replace(_on_one_line(_NO_PROSE.sub(" ", sentence)), " ")
    return _NUMBER.findall(left)


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
