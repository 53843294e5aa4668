"""Long texts are learned whole, piece by piece."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.data import EncodedRecords, Records, cut_texts
from sparse_cl.data.records import Record


def texts(*given):
    records = [Record.at(f"file:{number}", text=text) for number, text in enumerate(given, 1)]
    return Records(records, "text", "file")


@pytest.fixture(scope="module")
def words(tokenizer):
    return tokenizer


@given(st.lists(st.text(st.characters(codec="ascii"), min_size=1), min_size=1, max_size=4), st.integers(4, 40))
def test_pieces_are_the_text_and_each_fits(words, given_texts, length):
    given_texts = [text for text in given_texts if text.strip()] or ["a"]
    records = texts(*given_texts)
    cut = cut_texts(records, words, length)
    for number, text in enumerate(given_texts, 1):
        pieces = [record["text"] for record in cut if record.where == f"file:{number}"]
        assert "".join(pieces).split() == text.split() or "".join("".join(pieces).split()) == "".join(text.split())
    for record, example in zip(cut, EncodedRecords(cut.records, words, 10**6), strict=True):
        # A piece may be tokenized otherwise than it was within its text, by a token or so.
        assert len(example["input_ids"]) <= length + 2, record


def test_what_fits_stays_and_it_is_said_what_was_cut(words):
    short = texts("one two three")
    assert cut_texts(short, words, 64) is short
    cut = cut_texts(texts("one two three " * 50), words, 32)
    assert len(cut) > 4 and cut.describe().endswith(f"in {len(cut)} pieces of at most 32 tokens")
    assert cut.fingerprint != texts("one two three " * 50).fingerprint


def test_what_was_cut_stays_cut_where_one_piece_has_words(words):
    (left,) = cut_texts(texts("\n" * 1000 + "one two"), words, 32)
    assert left["text"].strip() == "one two" and len(left["text"]) < 100


def test_only_the_last_piece_of_a_text_ends_it(words):
    cut = cut_texts(texts("one two three " * 50, "four five"), words, 32)
    ends = [example["input_ids"][-1] == words.eos_token_id for example in EncodedRecords(cut.records, words, 64)]
    assert ends == [*[False] * (len(cut) - 2), True, True]
