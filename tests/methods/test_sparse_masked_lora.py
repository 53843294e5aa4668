"""Adapters in a side branch change nothing but the chosen neurons."""

from __future__ import annotations

import pytest
import torch
import transformers
from cases.methods import domain, learn, logits, weights

from sparse_cl.methods import SparseMasked, SparseMaskedLoRA
from sparse_cl.models.parts import find_mlps, is_transposed
from sparse_cl.nn import restore

GLU = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300, "pad_token_id": 0}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**GLU, intermediate_size=24),
    "phi3": lambda: transformers.Phi3Config(**GLU, intermediate_size=24),
    "gpt2": lambda: transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_inner=24, vocab_size=300),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_change_of_every_matrix_is_zero_outside_the_neurons_and_not_inside(family):
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).float()
    method, reference = SparseMaskedLoRA(fraction=0.25, rank=4), SparseMasked(fraction=0.25)
    model = base
    for number in range(2):
        plain = model.merge_and_unload() if number else model
        before = weights(plain)
        mlps = find_mlps(plain)
        reference.before_domain(plain, domain(number))
        restore(plain)
        model = learn(method, plain, domain(number))
        seen = logits(model, domain(number))
        opened = method.account.opened
        assert method.account.opened.keys() == {mlp.name for mlp in mlps}
        deltas = {
            name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
            for name, layer in model.named_modules()
            if hasattr(layer, "get_delta_weight")
        }
        assert deltas.keys() == {name for mlp in mlps for name in (*mlp.into, mlp.out_name)}
        for mlp in mlps:
            chosen = opened[mlp.name]
            assert int(chosen.sum()) == 6
            assert torch.equal(reference.account.opened[mlp.name], chosen), "those of sparse-masked"
            for name, layer in mlp.into.items():
                delta = deltas[name].T if is_transposed(layer) else deltas[name]
                rows = chosen.repeat(2) if mlp.layout.stacked else chosen
                assert torch.equal(delta.ne(0).any(1), rows)
            delta = deltas[mlp.out_name].T if is_transposed(mlp.out) else deltas[mlp.out_name]
            assert torch.equal(delta.ne(0).any(0), chosen)
        after = weights(model.merge_and_unload())
        torch.testing.assert_close(logits(plain, domain(number)), seen, rtol=1e-4, atol=1e-5)
        for name, weight in after.items():
            layer = name.removesuffix(".weight")
            if layer in deltas:
                untouched = deltas[layer] == 0
                assert torch.equal(weight[untouched], before[name][untouched])
                assert not torch.equal(weight, before[name])
            else:
                assert torch.equal(weight, before[name])


def test_a_fresh_adapter_changes_nothing_and_state_is_that_of_the_neurons(tiny_llama):
    method, batches = SparseMaskedLoRA(fraction=0.25, rank=4), domain(0)
    before = logits(tiny_llama, batches)
    model = method.before_domain(tiny_llama, batches)
    assert torch.equal(logits(model, batches), before)
    optimizer = method.make_optimizer(model, 1e-2)
    model(**batches[0]).loss.backward()
    optimizer.step()
    moments = {
        name: state["exp_avg"]
        for name, state in zip(
            optimizer.param_groups[0]["param_names"],
            (optimizer.state[p] for p in optimizer.param_groups[0]["params"]),
            strict=True,
        )
    }
    assert len(moments) == 12
    for name, moment in moments.items():
        into = "down_proj" not in name
        expected = {(True, True): (4, 16), (True, False): (6, 4), (False, True): (4, 6), (False, False): (16, 4)}
        assert tuple(moment.shape) == expected[into, "lora_A" in name]


@pytest.mark.parametrize(("arguments", "message"), [({"rank": 0}, "rank: expected"), ({"alpha": 0}, "alpha: expected")])
def test_adapters_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseMaskedLoRA(**arguments)
