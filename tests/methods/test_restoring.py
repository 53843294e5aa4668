"""A run that goes on keeps the model that it was given."""

from __future__ import annotations

import pytest
import torch
import transformers
from cases.methods import SHIPPED, copy_of, domain, learn, same, weights

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


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.protects])
def test_a_text_is_protected_before_the_first_domain_or_not_at_all(tiny_llama, name):
    method = METHODS[name]()
    learn(method, tiny_llama, domain(0))
    with pytest.raises(ValueError, match=f"{name}: protect comes once, before the first domain"):
        method.protect(tiny_llama, domain(1))


@pytest.mark.parametrize("name", ["elastic", "elastic-lora", "orthogonal", "orthogonal-lora", "orthogonal-masked"])
def test_a_domain_that_was_not_begun_is_not_trained_unprotected(tiny_llama, name):
    method = METHODS[name]()
    with pytest.raises(RuntimeError, match=f"{name}: make_optimizer comes after before_domain"):
        method.make_optimizer(tiny_llama, lr=1e-3)
    model = learn(method, tiny_llama, domain(0))
    for late in (lambda: method.make_optimizer(model, lr=1e-3), lambda: method.after_domain(model, domain(0))):
        with pytest.raises(RuntimeError, match=f"{name}: .* comes after before_domain"):
            late()


@pytest.mark.parametrize("name", ["sparse-masked-lora", "two-four"])
def test_masks_are_those_of_a_wrapped_model_too(tiny_llama, name):
    method = METHODS[name]()
    model = method.before_domain(learn(method, tiny_llama, domain(0)), domain(1))
    plain, wrapped = (method.make_optimizer(each, lr=1e-3) for each in (model, torch.compile(model)))
    assert len(plain.masks) > 0 and [*plain.masks.values()] == [*wrapped.masks.values()]


@pytest.mark.parametrize("name", SHIPPED)
def test_batches_need_no_mask_where_nothing_is_padded(tiny_llama, name):
    def unpadded(seed, masked):
        rows = [{key: value[:1] for key, value in batch.items()} for batch in domain(seed)]
        return rows if masked else [{key: row[key] for key in ("input_ids", "labels")} for row in rows]

    found = []
    for masked in (True, False):
        method, model = METHODS[name](), copy_of(tiny_llama)
        for number in range(2):
            model = learn(method, model, unpadded(number, masked))
        found.append(weights(model))
    for parameter, value in found[0].items():
        torch.testing.assert_close(found[1][parameter], value, rtol=1e-3, atol=1e-4)
