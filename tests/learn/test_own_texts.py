"""Texts that a model writes by itself."""

from __future__ import annotations

import pytest
import torch

from sparse_cl.learn.own_texts import write_texts

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
CHAT = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture
def model(tiny_llama):
    # What a checkpoint asks for is not what the model knows.
    tiny_llama.generation_config.num_beams, tiny_llama.generation_config.suppress_tokens = 3, list(range(200))
    return tiny_llama


def written(model, tokenizer, **others):
    given = {"texts": 5, "length": 16, "context": 64, "batch_size": 2, "seed": 0}
    return write_texts(model, tokenizer, **{**given, **others})


def test_they_are_drawn_from_the_model_whatever_its_checkpoint_asks_for(model, tokenizer):
    state = torch.get_rng_state()
    texts = written(model, tokenizer)
    assert torch.equal(state, torch.get_rng_state())
    assert texts == written(model, tokenizer) != written(model, tokenizer, seed=1)
    assert [len(text["input_ids"]) for text in texts] == [16] * 5
    assert all(text["labels"] == text["input_ids"] for text in texts)
    found = [token for text in written(model, tokenizer, texts=64) for token in text["input_ids"][1:]]
    assert min(found) < 200 and len(set(found)) > 150
    assert model.generation_config.num_beams == 3


def test_a_model_that_knows_its_next_token_writes_it(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))  # no longer the embedding
        model.lm_head.weight[7] = 1e4 * torch.ones(16)
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.fill_(1.0)
    (text,) = written(model, tokenizer, texts=1)
    assert set(text["input_ids"][1:]) == {7}


def test_a_chat_model_writes_a_message_and_its_answer(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    for text in written(model, tokenizer, length=64):
        ids = text["input_ids"]
        said = tokenizer.decode(ids)
        assert said.startswith("<user>") and "</s><assistant>" in said
        assert 0 not in ids[1:-1], "it stops at its end token"


def test_a_long_template_leaves_the_model_as_much_to_write(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "abc " * 30 + CHAT)
    before = len(tokenizer("abc " * 30 + "<user>", add_special_tokens=False)["input_ids"])
    texts = [text["input_ids"] for text in written(model, tokenizer, length=32, context=before + 32)]
    assert max(map(len, texts)) > before + 24
    assert len({tuple(ids[before:]) for ids in texts}) == 5
    with pytest.warns(UserWarning, match=rf"writes {before} tokens before a message, of {before + 8} that fit"):
        plain = written(model, tokenizer, length=32, context=before + 8)
    assert all("<user>" not in tokenizer.decode(text["input_ids"]) for text in plain)


def test_a_tokenizer_without_a_first_token_is_refused(model, tokenizer, monkeypatch):
    for name in ("bos_token", "eos_token"):
        monkeypatch.setattr(type(tokenizer), f"{name}_id", None, raising=False)
    with pytest.raises(ValueError, match="protect: the tokenizer has neither a first nor an end token"):
        written(model, tokenizer)
