"""The elastic adapter: where it starts, how far its A goes, what stays, and that it goes on after an interruption."""

from __future__ import annotations

import pytest
import torch
from cases.methods import copy_of, domain, learn, logits, same, weights
from cases.rules import rms

from sparse_cl.methods import ElasticLoRA
from sparse_cl.methods.lora import merged

LR = 3e-3


def adapters(model):
    """(layer's name, A, B) of each adapted layer."""
    prefix = "base_model.model."
    return [
        (name.removeprefix(prefix), module.lora_A["default"].weight, module.lora_B["default"].weight)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    ]


WHOLE = {"energy": 1.0, "max_rank": None}


@pytest.mark.parametrize("settings", [{"max_rank": 4}, WHOLE])
def test_an_adapter_starts_outside_what_is_used_and_at_zero(tiny_llama, settings):
    method = ElasticLoRA(**settings)
    model = learn(method, tiny_llama, domain(0), lr=LR)
    model = method.before_domain(model, domain(1))
    assert len(adapters(model)) == 14
    for name, a, b in adapters(model):
        assert not b.any()
        subspace = method.memory.subspace(f"{name}.weight").to(dtype=torch.float64)
        turned, use, width = a.detach().double() @ subspace.basis, subspace.usage, subspace.width
        # PEFT draws uniformly on ±1/√n, which a direction then has divided by 1 + u.
        spread = turned.square().mean(0).sqrt() * (1 + use) * width**0.5
        assert 0.3 < float(spread.mean()) < 0.9
        assert float(turned[:, 0].abs().max()) < 5 * width**-0.5 / (1 + float(use[0]))
        if settings == WHOLE:
            continue
        outside = subspace.project_out_(a.detach().double())
        assert 0.3 < float(outside.square().mean().sqrt()) * width**0.5 < 0.9, "elsewhere it is as PEFT drew it"


@pytest.mark.parametrize("strength", [0.001, 4000.0])
def test_a_goes_no_further_into_a_direction_than_its_pull_lets_it(tiny_llama, strength):
    """A step of AdamW is at most lr·b and ends with a division by 1 + lr·κ: |A u| <= max(|A₀ u|, b/κ)."""
    method, steps, start, used = ElasticLoRA(strength=strength), 12, {}, {}
    model = learn(method, tiny_llama, domain(0), lr=LR)
    before = method.before_domain

    def remembered(model, batches):
        adapted = before(model, batches)
        start.update({name: a.detach().clone() for name, a, _ in adapters(adapted)})
        used.update({name: method.memory.subspace(f"{name}.weight") for name in start})
        return adapted

    method.before_domain = remembered
    model = learn(method, model, domain(1), lr=LR, steps=steps)
    most, tight = 2.0 * steps**0.5, 0  # above every |m̂|/√v̂ of so few steps, and the decay
    for name, a, _ in adapters(model):
        basis, kappa = used[name].basis.double(), used[name].usage.double() * strength / rms(start[name])
        now, then = ((x.detach().double() @ basis).abs() for x in (a, start[name]))
        bound = torch.maximum(then, most * basis.abs().sum(0) / kappa)
        assert bool((now <= bound * (1 + 1e-5) + 1e-7).all())
        tight += int((now.norm(dim=0) < 0.1 * then.norm(dim=0)).sum())
    assert (tight > 0) == (strength > 1)


def test_the_stronger_the_less_of_the_change_is_in_what_is_used(tiny_llama):
    leaks = []
    for strength in (0.0, 0.5, 50.0):
        method = ElasticLoRA(strength=strength)
        model = learn(method, copy_of(tiny_llama), domain(0), lr=LR)
        model = learn(method, model, domain(1), lr=LR, steps=12)
        shares = [layer["leak"] for layer in method.record()["layers"].values()]
        leaks.append(sum(shares) / len(shares))
    assert leaks[0] > leaks[1] > leaks[2]
    assert leaks[2] < 0.5 * leaks[0]


def test_the_base_stays_and_each_domain_is_merged(tiny_llama):
    method, before = ElasticLoRA(), weights(tiny_llama)
    model = learn(method, tiny_llama, domain(0), lr=LR)
    assert all(not p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)
    for name, p in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, before[name.removeprefix("base_model.model.").replace(".base_layer", "")])
    expected = logits(model, domain(0))
    again = method.before_domain(model, domain(1))
    # A fresh adapter, its B at zero, on weights that hold the old one.
    torch.testing.assert_close(logits(again, domain(0)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", [False, True])
def test_a_resumed_run_goes_on_with_the_same_bits(tiny_llama, tmp_path, text):
    base, method, model = copy_of(tiny_llama), ElasticLoRA(), tiny_llama
    if text:
        method.protect(model, domain(3))
    folders = [tmp_path / str(number) for number in range(2)]
    for number, folder in enumerate(folders):
        model = learn(method, model, domain(number), lr=LR, folder=folder)
    model = learn(method, model, domain(2), lr=LR)
    other = ElasticLoRA()
    resumed = learn(other, other.restore(base, folders), domain(2), lr=LR)
    assert same(weights(merged(model)), weights(merged(resumed)))
    assert method.record() == other.record()
