from __future__ import annotations

import math

import pytest
import torch
import transformers
from cases.tokenizers import WithBos

from sparse_cl.four_domains.domains import Domain
from sparse_cl.four_domains.evaluate import (
    accuracy,
    bits_per_byte,
    choice_continuations,
    evaluate_domain,
    exact_match,
    extract_answer,
    text_bits_per_byte,
)

RECORDS = [
    {"prompt": "What is one plus two?", "response": "three"},
    {"prompt": "Name it.", "response": "Ünïcödé ✓"},
    {"prompt": "A much longer prompt than the other ones, for padding", "response": "The answer is two."},
]


def nats_of(model, prompt_ids, continuation_ids):
    """−ln p, token by token, without batching, padding or shifting."""
    total = 0.0
    for position, token in enumerate(continuation_ids):
        context = torch.tensor([[*prompt_ids, *continuation_ids[:position]]])
        total -= model(input_ids=context).logits[0, -1].double().log_softmax(-1)[token].item()
    return total


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_bits_per_byte_equals_brute_force(tokenizer, tiny_llama, batch_size):
    nats = sum(
        nats_of(tiny_llama, tokenizer(r["prompt"] + "\n")["input_ids"], tokenizer(r["response"])["input_ids"])
        for r in RECORDS
    )
    expected = nats / math.log(2) / sum(len(r["response"].encode()) for r in RECORDS)
    assert bits_per_byte(tiny_llama, tokenizer, RECORDS, 256, batch_size) == pytest.approx(expected, rel=1e-5)


def test_a_uniform_model_needs_log2_of_the_vocabulary_for_each_token(tokenizer, tiny_llama):
    torch.nn.init.zeros_(tiny_llama.lm_head.weight)
    record = {"prompt": "p", "response": "q" * 50}
    tokens = len(tokenizer(record["response"])["input_ids"])
    expected = tokens * math.log2(tiny_llama.config.vocab_size) / 50
    assert bits_per_byte(tiny_llama, tokenizer, [record], 256) == pytest.approx(expected, rel=1e-5)
    text = "zxq" * 30
    ids = tokenizer(text)["input_ids"]
    scored = len(ids) - math.ceil(len(ids) / 8)
    text_bytes = len(text) - sum(len(tokenizer.decode([i])) for i in ids[::8])
    expected = scored * math.log2(tiny_llama.config.vocab_size) / text_bytes
    assert text_bits_per_byte(tiny_llama, tokenizer, text, 8) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bos", [False, True])
def test_text_bits_per_byte_equals_brute_force(tokenizer, tiny_llama, bos):
    text = "What is one plus two? The answer is three. And what then?"
    ids = tokenizer(text)["input_ids"]
    nats, counted = 0.0, 0
    for start in range(0, len(ids), 9 if bos else 10):
        window = [7, *ids[start : start + 9]] if bos else ids[start : start + 10]
        nats += nats_of(tiny_llama, window[:1], window[1:])
        counted += len(tokenizer.decode(window[1:]).encode())
    result = text_bits_per_byte(tiny_llama, WithBos(tokenizer) if bos else tokenizer, text, 10)
    assert result == pytest.approx(nats / math.log(2) / counted, rel=1e-5)


def test_a_text_too_short_is_an_error(tokenizer, tiny_llama):
    with pytest.raises(ValueError, match="too short"):
        text_bits_per_byte(tiny_llama, tokenizer, "a", 10)


@pytest.mark.parametrize(
    ("response", "choices", "answer", "index", "given", "continuations"),
    [
        ("The answer is (B) 16.", ["12", "16"], "B", 1, "The answer is", [" (A) 12.", " (B) 16."]),
        ("The answer is (B).", ["x", "y"], "B", 1, "The answer is", [" (A).", " (B)."]),
        ("1/2 is B, so\n#### B", ["1/3", "1/2"], "B", 1, "####", [" A", " B"]),
        ("Since it does.\n\nThe answer is yes.", ["yes", "no"], "yes", 0, "The answer is", [" yes.", " no."]),
        ("The answer is Sentence A.", ["Sentence A", "Sentence B"], "Sentence A", 0, "The answer is", None),
        ("blue", ["red", "blue"], "blue", 1, "", ["red", "blue"]),
        ("No such thing here", ["red", "blue"], "blue", 1, "", ["red", "blue"]),
    ],
)
def test_choices_are_scored_in_the_form_of_the_response(response, choices, answer, index, given, continuations):
    record = {"prompt": "?", "response": response, "choices": choices, "answer": answer, "answer_index": index}
    continuations = continuations or [f" {choice}." for choice in choices]
    assert choice_continuations(record) == (given, continuations)


def test_accuracy_equals_brute_force(tokenizer, tiny_llama):
    choices = ["one", "two", "fortyfour", "an apple"]
    records = [
        {
            "prompt": f"Question {i}?",
            "response": f"The answer is {choices[i % 4]}.",
            "choices": choices,
            "answer": choices[i % 4],
            "answer_index": i % 4,
        }
        for i in range(12)
    ]
    right = 0
    for record in records:
        prompt = tokenizer(record["prompt"] + "\n")["input_ids"] + tokenizer("The answer is")["input_ids"]
        scores = [
            -nats_of(tiny_llama, prompt, tokenizer(f" {choice}.")["input_ids"]) / len(f" {choice}.".encode())
            for choice in choices
        ]
        right += max(range(4), key=scores.__getitem__) == record["answer_index"]
    assert accuracy(tiny_llama, tokenizer, records, 256) == right / 12


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 2 = 4\n#### 4\nmore", "4"),
        ("#### 3\n#### 1,250", "1250"),
        ("The answer is Monday. And more", "Monday. And more"),
        ("So. The answer is Monday.", "Monday"),
        (" SELECT a FROM b ", "SELECT a FROM b"),
        ("The answer is 3, 4 and 5.", "3, 4 and 5"),
        ("", ""),
    ],
)
def test_answers_are_extracted(text, answer):
    assert extract_answer(text) == answer


class Parrot(torch.nn.Module):
    """Continues every prompt of the table by its text, whatever the padding."""

    def __init__(self, tokenizer, table):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer, self.table = tokenizer, table
        self.generation_config = None

    def generate(self, input_ids, attention_mask):
        max_new_tokens = self.generation_config.max_new_tokens
        assert attention_mask[:, -1].all(), "prompts must be padded on the left"
        prompts = [self.tokenizer.decode(row[m.bool()]) for row, m in zip(input_ids, attention_mask, strict=True)]
        out = [self.tokenizer(self.table[p.strip()])["input_ids"][:max_new_tokens] for p in prompts]
        width = max(map(len, out))
        out = torch.tensor([row + [0] * (width - len(row)) for row in out])
        return torch.cat([input_ids, out], 1)


def test_exact_match_counts_right_answers(tokenizer):
    records = [
        {"prompt": "1+1", "response": "two\n#### 2", "answer": "2"},
        {"prompt": "a longer 1+2", "response": "three\n#### 3", "answer": "3"},
        {"prompt": "day", "response": "The answer is Monday.", "answer": "Monday"},
    ]
    model = Parrot(tokenizer, {"1+1": "why\n#### 2", "a longer 1+2": "#### 4", "day": "The answer is Monday."})
    assert exact_match(model, tokenizer, records, 256) == pytest.approx(2 / 3)


def test_records_whose_code_would_have_to_run_are_not_scored_as_answers(tokenizer, tiny_llama):
    record = {"prompt": "p", "response": "r", "answer": "r", "tests": "raise SystemExit", "mode": "function"}
    domain = Domain("code", RECORDS, RECORDS, RECORDS, [record])
    scores = evaluate_domain(tiny_llama, tokenizer, domain, max_length=64, max_records=2)
    assert scores["bits_per_byte"] == bits_per_byte(tiny_llama, tokenizer, RECORDS[:2], 64)
    assert scores["accuracy"] is scores["exact_match"] is None


def test_the_models_mode_is_put_back(tokenizer, tiny_llama):
    tiny_llama.train()
    evaluate_domain(tiny_llama, tokenizer, Domain("d", RECORDS, RECORDS, RECORDS, []), max_length=64, max_records=1)
    assert tiny_llama.training


@pytest.mark.parametrize(
    "config",
    [
        {"do_sample": True, "temperature": 5.0},
        {"repetition_penalty": 5.0},
        {"num_beams": 3, "num_return_sequences": 2},
        {"return_dict_in_generate": True},
        {"suppress_tokens": list(range(250))},
    ],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_exact_match_is_greedy_whatever_the_checkpoint_says(tokenizer, tiny_llama, config, adapted, monkeypatch):
    records = [
        {"prompt": "one", "response": "a b c d", "answer": "-"},
        {"prompt": "two", "response": "a", "answer": "-"},
    ]
    texts = []
    monkeypatch.setattr("sparse_cl.four_domains.evaluate.extract_answer", lambda text: texts.append(text) or text)
    if adapted:
        import peft

        tiny_llama = peft.get_peft_model(tiny_llama, peft.LoraConfig(task_type="CAUSAL_LM"))
    exact_match(tiny_llama, tokenizer, records, 64)
    plain = list(texts)
    for name, value in config.items():
        setattr(tiny_llama.generation_config, name, value)
    texts.clear()
    exact_match(tiny_llama, tokenizer, records, 64)
    assert texts == plain
    for name, value in config.items():
        assert getattr(tiny_llama.generation_config, name) == value, "it is the model's own again"


def test_bits_per_byte_of_conversations_and_texts(tokenizer, tiny_llama):
    """Without a template a conversation's turns are the lines of a text, which can be scored by hand."""
    turns = [("user", "one?"), ("assistant", "two"), ("user", "three?"), ("assistant", "four")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    parts = [tokenizer(text)["input_ids"] for text in ("one?\n", "two", "three?\n", "four")]
    end = [tokenizer.eos_token_id]
    nats = nats_of(tiny_llama, parts[0], parts[1])
    nats += nats_of(tiny_llama, [*parts[0], *parts[1], *end, *parts[2]], parts[3])
    found = bits_per_byte(tiny_llama, tokenizer, [chat], 256)
    assert found == pytest.approx(nats / math.log(2) / len("twofour"), rel=1e-5)

    text = "What is one plus two?"
    ids = tokenizer(text)["input_ids"]
    scored = len(text) - len(tokenizer.decode(ids[:1]))
    nats = nats_of(tiny_llama, ids[:1], ids[1:])
    found = bits_per_byte(tiny_llama, tokenizer, [{"text": text}], 256)
    assert found == pytest.approx(nats / math.log(2) / scored, rel=1e-5)


def test_a_tokenizer_without_offsets_and_with_fewer_tokens_than_the_model_has_rows(tiny_llama):
    """ByT5's tokens are bytes, so that the bytes of a text are known; and it cannot decode what it has no token for."""
    slow = transformers.ByT5Tokenizer(extra_ids=0)
    slow.pad_token = slow.eos_token
    text = "One plus two is three."
    nats = nats_of(tiny_llama, slow(text)["input_ids"][:1], slow(text)["input_ids"][1:-1])
    found = text_bits_per_byte(tiny_llama, slow, text, 256)
    assert found == pytest.approx(nats / math.log(2) / (len(text) - 1), rel=1e-5)

    beyond, right = tiny_llama.config.vocab_size - 1, slow("three", add_special_tokens=False)["input_ids"]
    tiny_llama.generate = lambda input_ids, **how: torch.cat([input_ids, torch.tensor([[beyond, *right, beyond]])], 1)
    assert beyond >= len(slow)
    assert exact_match(tiny_llama, slow, [{"prompt": "p", "response": "three", "answer": "three"}], 256) == 1.0
