from __future__ import annotations

import pytest
import torch
import transformers
from cases.methods import domain, learn, weights

from benchmarks.arena import FreezeLower


def llama(layers, tied):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("layers", "share", "frozen"), [(4, 0.5, 2), (3, 0.5, 1), (4, 0.75, 3)])
def test_lower_blocks_and_embeddings_stay_bit_identical_and_the_rest_learns(layers, share, frozen, tied):
    model = llama(layers, tied)
    before = weights(model)
    method = FreezeLower(frozen_share=share)
    for seed in range(2):
        model = learn(method, model, domain(seed))
    still = {name for name, p in weights(model).items() if torch.equal(p, before[name])}
    lower = tuple(f"model.layers.{number}." for number in range(frozen))
    assert still == {name for name in before if name.startswith(lower) or "embed_tokens" in name}
    assert ("lm_head.weight" in before) == (not tied), "a tied head is the embedding matrix"


def test_position_embeddings_are_embeddings():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=300)
    )
    FreezeLower().before_domain(model, [])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {"transformer.wte.weight", "transformer.wpe.weight"} < frozen
    assert all(name.startswith(("transformer.w", "transformer.h.0.")) for name in frozen)
