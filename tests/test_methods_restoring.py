"""A run that goes on keeps the model that it was given."""

from __future__ import annotations

import pytest
import torch
import transformers
from method_cases import copy_of, domain, learn, same, weights

from sparse_cl.methods import METHODS

FULL = ("adamw", "ewc", "mofo", "freeze-lower", "elastic", "curvature", "two-four", "sparse-masked")


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("tied", [True, False])
def test_what_was_learned_is_loaded_into_the_base(tiny_llama, tmp_path, name, tied):
    config = transformers.LlamaConfig(**{**tiny_llama.config.to_dict(), "tie_word_embeddings": tied})
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config).eval()
    base.set_attn_implementation("eager")
    given = copy_of(base)
    given.set_attn_implementation("eager")
    learned = learn(METHODS[name](), base, domain(0), folder=tmp_path)
    model = METHODS[name]().restore(given, [tmp_path])
    assert model is given
    assert not model.training
    assert model.config._attn_implementation == "eager"
    assert same(weights(model), weights(learned))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
