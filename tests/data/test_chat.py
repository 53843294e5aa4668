"""Conversations: what is learned is the assistant's turns, and each one's end, whatever the template."""

from __future__ import annotations

import copy

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.data.encoding import IGNORED, encode, encode_record
from sparse_cl.data.records import DataError, Format, Record

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' [END]' }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
#: Drops the reasoning of all turns but the last, where it writes an empty one if there is none, as Qwen3's does.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}{% if loop.last %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ENDLESS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"


def turns(*contents, roles=("user", "assistant")):
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


TWO = turns("one plus two?", "three", "The answer is?", " It is three. ")
THOUGHT = turns("one?", "<think>\nplus\n</think>\n\none", "two?", "<think>\none plus one\n</think>\n\ntwo")
CALLED = [
    {"role": "user", "content": "what?"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "plus"}}]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "three"},
]
CASES = {
    "chatml": (CHATML, TWO, ["three<|im_end|>", " It is three. <|im_end|>"]),
    "llama-2": (LLAMA_2, TWO, ["three [END]", "It is three. [END]"]),
    "gemma": (GEMMA, TWO, ["three<end_of_turn>", "It is three.<end_of_turn>"]),
    "thinking, without a thought": (THINKING, TWO, ["three<|im_end|>", " It is three. <|im_end|>"]),
    "thinking": (THINKING, THOUGHT[2:], ["<think>\none plus one\n</think>\n\ntwo<|im_end|>"]),
    "calls": (CALLING, CALLED, ["<call>plus</call><|im_end|>", "three<|im_end|>"]),
    "bare": (BARE, TWO, ["three\n", " It is three. \n"]),
    "endless": (ENDLESS, TWO, ["three", " It is three. ", None]),
    "none": (None, TWO, ["three", None, " It is three. ", None]),
    "a question that is the answer": (CHATML, turns("three", "three"), ["three<|im_end|>"]),
    "the template's own words": (CHATML, turns("<|im_end|>\n", "a<|im_end|>\nb"), ["a<|im_end|>\nb<|im_end|>"]),
}


@pytest.fixture(params=["fast", "slow"])
def chatting(request, tokenizer):
    """A tokenizer by name: one with character offsets, and one without."""
    slow = request.param == "slow"
    return lambda template: templated(transformers.ByT5Tokenizer(extra_ids=0) if slow else tokenizer, template)


def templated(tokenizer, template):
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    return own


def learned(tokenizer, example):
    ids = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORED]
    return tokenizer.decode(ids)


@pytest.mark.parametrize("case", CASES)
def test_the_assistants_turns_are_learned_and_nothing_else(chatting, case):
    template, messages, expected = CASES[case]
    tokenizer = chatting(template)
    example = encode_record(tokenizer, {"messages": messages}, 10_000)
    end = tokenizer.eos_token
    # A token may hold the space before a turn, and then holds what is learned too.
    assert learned(tokenizer, example).removeprefix(" ") == "".join(end if text is None else text for text in expected)
    assert all(label in (IGNORED, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    text = tokenizer.decode(example.input_ids)
    if template:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert text.removesuffix(end if None in expected else "") == whole
    else:
        assert text == f"one plus two?\nthree{end}The answer is?\n It is three. {end}"


@pytest.mark.parametrize("case", CASES)
def test_what_is_scored_is_the_content_alone(chatting, case):
    template, messages, expected = CASES[case]
    tokenizer = chatting(template)
    example = encode_record(tokenizer, {"messages": messages}, 10_000)
    scored = "".join(tokenizer.decode(example.input_ids[start:end]) for start, end in example.spans)
    ends = ("<|im_end|>", " [END]", "<end_of_turn>", "\n") if template else ()
    contents = [text for text in expected if text is not None]
    for end in ends:
        contents = [text.removesuffix(end) for text in contents]
    assert scored.removeprefix(" ") == "".join(contents)
    assert example.scored_bytes == len("".join(contents).encode())


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=20)


@pytest.fixture(scope="module")
def chatml(tokenizer):
    return templated(tokenizer, CHATML)


@given(contents=st.lists(texts, min_size=2, max_size=6).filter(lambda contents: len(contents) % 2 == 0))
def test_whatever_the_turns_say(chatml, contents):
    example = encode_record(chatml, {"messages": turns(*contents)}, 10_000)
    assert learned(chatml, example) == "".join(content + "<|im_end|>" for content in contents[1::2])


@given(prompt=texts, response=texts, max_length=st.integers(4, 40))
def test_without_a_template_one_turn_is_a_prompt_and_its_response(tokenizer, prompt, response, max_length):
    conversation = encode_record(tokenizer, {"messages": turns(prompt, response)}, max_length)
    pair = encode(tokenizer, prompt, response, max_length)
    assert (conversation.input_ids, conversation.labels) == (pair.input_ids, pair.labels)
    assert conversation.spans == pair.spans


@pytest.mark.parametrize("max_length", [8, 16, 32])
def test_too_long_a_conversation_keeps_something_to_learn(chatting, max_length):
    tokenizer = chatting(CHATML)
    example = encode_record(
        tokenizer, {"messages": turns("a long question " * 9, "an answer", "so?", "yes")}, max_length
    )
    assert len(example.input_ids) == len(example.labels) == max_length
    assert learned(tokenizer, example).startswith("an answer"[: max_length // 2 - 2])


def test_a_conversation_that_the_assistant_begins_has_one_first_token(tokenizer, monkeypatch):
    monkeypatch.setattr("sparse_cl.data.encoding._with_bos", lambda own, text: [1, *own(text)["input_ids"]])
    record = {"messages": turns("a b", "c d", roles=("assistant", "user"))}
    example = encode_record(tokenizer, record, 64)
    assert example.input_ids[0] == 1 and example.input_ids.count(1) == 1
    assert example.labels[0] == IGNORED != example.labels[1]


def test_calls_of_tools_need_a_template(tokenizer):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    record = Format(["messages"], {}, "file").record({"messages": [*turns("a")[:1], call]}, "file:1")
    with pytest.raises(DataError, match="file:1: the tokenizer has no chat template"):
        encode_record(tokenizer, record, 64)


def test_a_template_that_refuses_names_the_record(tokenizer):
    record = Record.at("a.jsonl:7", messages=turns("be kind", "q", "a", roles=("system", "user", "assistant")))
    with pytest.raises(DataError, match=r"a\.jsonl:7: the tokenizer's chat template refuses .* only user and assist"):
        encode_record(templated(tokenizer, LLAMA_2), record, 64)


def test_a_template_that_hides_turns_is_refused(tokenizer):
    hiding = "{% for m in messages %}{{ m.content.upper() }}{{ messages | length }}{% endfor %}"
    record = Record.at("a.jsonl:7", messages=turns("q", "a", "q", "a"))
    with pytest.raises(DataError, match=r"a\.jsonl:7: the tokenizer's chat template changes the assistant's turn 1 "):
        encode_record(templated(tokenizer, hiding), record, 64)
