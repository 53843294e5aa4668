from __future__ import annotations

import pytest
import torch
from cases.tokenizers import WithBos
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorForSeq2Seq

from sparse_cl.data.encoding import IGNORED, EncodedRecords, encode, encode_prompt, pad, text_windows

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)


@given(prompt=texts, response=texts)
def test_labels_are_the_response_and_its_end(tokenizer, prompt, response):
    example = encode(tokenizer, prompt, response, 10_000)
    ((start, end),) = example.spans
    assert tokenizer.decode(example.input_ids[:start]) == prompt + "\n"
    assert tokenizer.decode(example.input_ids[start:end]) == response
    assert example.input_ids[end:] == [tokenizer.eos_token_id]
    assert example.labels == [IGNORED] * start + example.input_ids[start:]
    assert example.scored_bytes == len(response.encode())


@given(prompt=texts, response=texts, max_length=st.integers(4, 30))
def test_truncation_keeps_the_end_of_the_prompt_and_the_start_of_the_response(tokenizer, prompt, response, max_length):
    whole = encode(tokenizer, prompt, response, 10_000)
    cut = encode(tokenizer, prompt, response, max_length)
    assert len(cut.input_ids) == len(cut.labels) == min(max_length, len(whole.input_ids))
    ((start, _),), ((cut_start, cut_end),) = whole.spans, cut.spans
    prompt_ids, cut_ids = whole.input_ids[:start], cut.input_ids[:cut_start]
    assert cut_ids == prompt_ids[len(prompt_ids) - len(cut_ids) :]
    assert len(cut_ids) >= min(len(prompt_ids), max_length // 2)
    assert cut.input_ids[cut_start:cut_end] == whole.input_ids[start:][: cut_end - cut_start]
    decoded = tokenizer.decode(cut.input_ids[cut_start:cut_end], errors="replace")
    if "\ufffd" not in decoded:
        assert cut.scored_bytes == len(decoded.encode())


def test_a_bos_stays_first_and_a_tokenizers_own_eos_is_not_put_between(tokenizer):
    wrapped = WithBos(tokenizer)
    plain = tokenizer("long prompt\n")["input_ids"]
    assert encode_prompt(wrapped, "long prompt") == [7, *plain]
    cut = encode(wrapped, "long prompt", "yes", 8)
    assert len(cut.input_ids) == 8
    assert cut.input_ids[0] == 7
    start = cut.spans[0][0]
    assert cut.input_ids[1:start] == plain[-(start - 1) :]


@settings(max_examples=20)
@given(text=st.text("onetw ?é", max_size=60), max_length=st.integers(4, 20), bos=st.booleans())
def test_windows_of_a_text_are_all_of_it_each_after_the_bos(tokenizer, text, max_length, bos):
    plain = tokenizer(text)["input_ids"]
    windows = text_windows(WithBos(tokenizer) if bos else tokenizer, text, max_length)
    head = [7] if bos else []
    assert all(window.input_ids[: len(head)] == head and len(window.input_ids) <= max_length for window in windows)
    assert all(len(window.input_ids) == max_length for window in windows[:-1])
    assert [token for window in windows for token in window.input_ids[len(head) :]] == plain
    assert all(window.spans == ((1, len(window.input_ids)),) for window in windows)
    if bos:
        assert sum(window.scored_bytes for window in windows) == len(text.encode())


def test_too_short_a_length_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="at least 4 tokens, got 3"):
        encode(tokenizer, "a", "b", 3)


def test_the_training_loss_is_on_the_response_only(tokenizer, tiny_llama):
    records = [
        {"prompt": "What is one plus two?", "response": "three"},
        {"prompt": "Two?", "response": "The answer is two."},
    ]
    encoded = EncodedRecords(records, tokenizer, 64)
    batch = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)([encoded[0], encoded[1]])
    loss = tiny_llama(**batch).loss.item()

    nats, count = 0.0, 0
    for record in records:
        prompt = tokenizer(record["prompt"] + "\n")["input_ids"]
        response = [*tokenizer(record["response"])["input_ids"], tokenizer.eos_token_id]
        for position, token in enumerate(response):
            context = torch.tensor([prompt + response[:position]])
            nats -= tiny_llama(input_ids=context).logits[0, -1].log_softmax(-1)[token].item()
            count += 1
    assert loss == pytest.approx(nats / count, rel=1e-5)


def test_padding_on_either_side():
    ids, mask = pad([[1, 2, 3], [4]], 9)
    assert (ids.tolist(), mask.tolist()) == ([[1, 2, 3], [4, 9, 9]], [[1, 1, 1], [1, 0, 0]])
    ids, mask = pad([[1, 2, 3], [4]], 9, left=True)
    assert (ids.tolist(), mask.tolist()) == ([[1, 2, 3], [9, 9, 4]], [[1, 1, 1], [0, 0, 1]])
