"""What the tokenizer shows to be wrong is said before a model is loaded; and what is learned can be looked at."""

from __future__ import annotations

import copy

import pytest
import transformers

from sparse_cl.data import DataError, EncodedRecords, check_records, check_tokenizer, read_records, show
from sparse_cl.data.checks import _marked, check_text
from sparse_cl.data.encoding import encode, encode_text, tokenized
from sparse_cl.data.records import Record, Records

GOOD = [Record.at("a.jsonl:1", prompt="one plus two?", response="three")]


def extended(tokenizer, **tokens):
    own = copy.deepcopy(tokenizer)
    own.add_tokens(tokens.pop("tokens", []))
    own.add_special_tokens(tokens)
    return own


def test_records_that_can_be_learned(tokenizer):
    records = [
        *GOOD,
        Record.at("a.jsonl:2", text="One plus two."),
        Record.at("a.jsonl:3", messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]),
    ]
    check_records(records, tokenizer, len(tokenizer), 16)


def test_a_token_beyond_the_embedding_is_named_with_its_record(tokenizer):
    own = extended(tokenizer, tokens=["<tool>"])
    rows = len(tokenizer)
    records = [*GOOD, Record.at("a.jsonl:2", prompt="use <tool>", response="done")]
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .* token {rows} \('<tool>'\), .* the embedding has {rows} rows"):
        check_records(records, own, rows, 64)
    check_records(records, own, rows + 1, 64)
    asked = Record.at(
        "a.jsonl:3", prompt="p", response="done", choices=["done", "<tool>"], answer="done", answer_index=0
    )
    with pytest.raises(DataError, match=rf"a\.jsonl:3: .* token {rows} \('<tool>'\)"):
        check_records([*GOOD, asked], own, rows, 64)
    with pytest.raises(DataError, match=rf"--reference: the text has token {rows} \('<tool>'\)"):
        check_text("a plain text with a <tool>", "--reference", own, rows)
    check_records(GOOD, own, rows, 64)  # it is not used


def test_a_padding_token_beyond_the_embedding_is_named(tokenizer):
    own = extended(tokenizer, pad_token="<my_pad>")
    with pytest.raises(DataError, match=rf"pads with token {len(tokenizer)} \('<my_pad>'\), .* {len(tokenizer)} rows"):
        check_records(GOOD, own, len(tokenizer), 64)
    check_tokenizer(own, len(own))


class Swallowing:
    """Wraps a tokenizer that makes nothing of blanks and has no end-of-sequence."""

    eos_token_id = bos_token_id = pad_token_id = chat_template = eos_token = None

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, **how):
        if isinstance(text, list):
            return {"input_ids": [self(one, **how)["input_ids"] for one in text]}
        return self.tokenizer(text.replace("\n", "").replace("\u2800", ""), **how)


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"prompt": "p", "response": "\u2800"}, "response"),
        ({"prompt": "", "response": "x"}, "response"),
        ({"text": "x"}, "text"),
        ({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "\u2800"}]}, "messages"),
    ],
)
def test_a_record_of_which_nothing_is_left_to_learn(tokenizer, record, field):
    with pytest.raises(DataError, match=rf"a\.csv:9: nothing is left to learn of `{field}`"):
        check_records([*GOOD, Record.at("a.csv:9", **record)], Swallowing(tokenizer), 1000, 16)


@pytest.mark.parametrize("max_length", [8, 12, 1000])
def test_a_tokenizer_without_offsets_counts_the_same_bytes(max_length):
    """ByT5's ids are bytes, so that what is kept is known."""
    slow = transformers.ByT5Tokenizer(extra_ids=0)
    response = "né, it is four"
    example = encode(slow, "What is two plus two?", response, max_length)
    ((start, end),) = example.spans
    assert example.scored_bytes == len(slow.decode(example.input_ids[start:end]).encode())
    assert (example.scored_bytes == len(response.encode())) == (max_length == 1000)
    ids, ends = tokenized(slow, response)
    assert [ends(count) for count in (0, 1, 3, len(ids))] == [0, 1, 3, len(response.encode())]


def test_a_text_is_learned_whole_and_scored_from_its_second_token_on(tokenizer):
    text = "One plus two is three."
    ids = tokenizer(text)["input_ids"]
    whole = encode_text(tokenizer, text, 1000)
    assert whole.input_ids == whole.labels == [*ids, tokenizer.eos_token_id]
    assert whole.spans == ((1, len(ids)),)
    assert whole.scored_bytes == len(text) - len(tokenizer.decode(ids[:1]))
    cut = encode_text(tokenizer, text, 4)
    assert cut.labels == ids[:4]
    assert cut.scored_bytes == len(tokenizer.decode(ids[1:4]))


def test_records_of_all_formats_are_one_data_set(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "b.jsonl").write_text('{"instruction": "one?", "output": "two"}\n')
    records = read_records([str(tmp_path)])
    encoded = EncodedRecords(records, tokenizer, 32)
    assert len(encoded) == 2
    for item in encoded:
        assert item.keys() == {"input_ids", "attention_mask", "labels"}
        assert len(item["input_ids"]) == len(item["labels"]) == sum(item["attention_mask"])


def test_a_space_that_a_sentencepiece_token_begins_with_is_shown():
    class Pieces:
        words = ("\u2581Where", "\u2581is", "\u2581", "4")

        def decode(self, ids):
            return "".join(self.words[token] for token in ids).replace("\u2581", " ").removeprefix(" ")

    assert _marked(Pieces(), [0, 1, 2, 3], [False, False, True, True]) == "Where| is« |4»"


def test_what_is_shown(tokenizer):
    records = Records(
        [Record.at("a.csv:2", prompt="What is one?", response="three " * 60)] * 5, "prompt/response", "a.csv"
    )
    head, first, tokens, *_ = show(records, tokenizer, 64).split("\n")
    assert head == "5 records (prompt/response) from a.csv"
    learned = 64 - len(tokenizer("What is one?\n")["input_ids"])
    assert first == f"a.csv:2: 64 tokens, cut to fit, {learned} of them (in «») are learned"
    assert tokens.replace("|", "").startswith("What is one?\\n«three three")
    assert f"… {learned - 48} tokens …" in tokens
    assert show(records, tokenizer, 64, count=2).count("a.csv:2:") == 2
    ended = show(Records(GOOD, "prompt/response", "a.jsonl"), tokenizer, 64)
    assert ended.endswith(f"|{tokenizer.eos_token}»")
