from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from cases.methods import copy_of, domain, learn, same, weights

from benchmarks.arena import MIGU
from sparse_cl.methods import AdamW
from sparse_cl.models import linear_layers


def second_domain(model, quantile=0.7):
    """A method after its first domain, and the optimizer of its second."""
    method = MIGU(quantile=quantile)
    learn(method, model, domain(0), steps=2)
    method.before_domain(model, domain(1))
    return method, method.make_optimizer(model.train(), 1e-3)


def kept_rows(model, batches, quantile):
    """Layer name -> which outputs have a mean magnitude at or above the quantile, by hooks of its own, float64."""
    layers, rows, hooks = linear_layers(model), {}, []
    for name, layer in layers.items():
        hooks.append(layer.register_forward_hook(lambda m, args, out, name=name: rows.setdefault(name, []).append(out)))
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    kept = {}
    for name in layers:
        seen = [out[b["attention_mask"].bool()] for out, b in zip(rows[name], batches, strict=True)]
        mean = torch.cat(seen).detach().double().abs().mean(0).numpy()
        kept[name] = torch.from_numpy(mean >= np.quantile(mean, quantile))
    return kept


@pytest.mark.parametrize("clip", [False, True])
def test_rows_below_the_quantile_of_all_tokens_since_the_last_step_get_no_gradient(tiny_llama, clip):
    method, optimizer = second_domain(tiny_llama)
    batches = domain(1)
    tiny_llama(**batches[2]).loss.backward()
    optimizer.step()  # what it saw is forgotten with it
    optimizer.zero_grad()
    kept = kept_rows(copy_of(tiny_llama), batches[:2], 0.7)
    with torch.no_grad():
        tiny_llama.eval()(**batches[3])  # what is evaluated does not count
    tiny_llama.train()
    for batch in batches[:2]:
        tiny_llama(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in tiny_llama.named_parameters()}
    for name, rows in kept.items():
        assert 0.25 <= rows.double().mean() <= 0.4
        expected[f"{name}.weight"] *= rows[:, None]
    norm = torch.stack([g.double().norm() for g in expected.values()]).norm()
    if clip:
        limit = float(norm) / 3
        assert float(optimizer.clip_grad_norm_(limit)) == pytest.approx(float(norm), rel=1e-5)
        expected = {name: g / 3 for name, g in expected.items()}
    else:
        optimizer.step()
    for name, p in tiny_llama.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-7)
        if clip:
            assert torch.equal(p.grad != 0, expected[name] != 0)
    method.after_domain(tiny_llama, batches)


def test_the_first_domain_is_adamw_s_and_no_hook_is_left_behind(tiny_llama):
    plain = copy_of(tiny_llama)
    method = MIGU()
    learn(method, tiny_llama, domain(0))
    learn(AdamW(), plain, domain(0))
    assert same(weights(tiny_llama), weights(plain))
    method.make_optimizer(tiny_llama, lr=1e-2)  # of a domain that is left half learned
    learn(method, tiny_llama, domain(1))
    learn(AdamW(), plain, domain(1))
    assert not same(weights(tiny_llama), weights(plain))
    for module in tiny_llama.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_weights_of_transposed_layers_are_masked_by_outputs_too():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=300)
    model = transformers.AutoModelForCausalLM.from_config(config)
    method, optimizer = second_domain(model, quantile=0.5)
    model.eval()  # no dropout
    for module in model.modules():
        module.training = not isinstance(module, torch.nn.Dropout)
    batches = domain(1)[:1]
    (name, kept), *_ = kept_rows(copy_of(model), batches, 0.5).items()
    assert name == "transformer.h.0.attn.c_attn"
    model(**batches[0]).loss.backward()
    optimizer.mask_gradients()
    layer = model.get_submodule(name)
    assert torch.equal(layer.weight.grad.any(0), kept)
    # Attention does not change with the keys' bias, whose gradient is what rounding leaves.
    keys = torch.arange(48) // 16 == 1
    assert torch.equal((layer.bias.grad != 0)[~keys], kept[~keys])
    assert not layer.bias.grad[~kept].any()
    method.after_domain(model, batches)
