from __future__ import annotations

import pytest
import torch
from cases.methods import copy_of, domain, learn, same, weights

from benchmarks.arena import EWC
from sparse_cl.methods import AdamW
from sparse_cl.probes.fisher import diagonal_fisher

GAMMA, LAMBDA = 0.5, 30.0


def disturbed(model):
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))


def test_the_penalty_and_its_gradient_are_those_of_the_accumulated_fisher(tiny_llama):
    method, model = EWC(ewc_lambda=LAMBDA, gamma=GAMMA), tiny_llama
    accumulated = None
    for seed in range(3):
        model = learn(method, model, domain(seed), steps=3)
        new = {name: f.double() for name, f in diagonal_fisher(model, domain(seed), seed=0).items()}
        accumulated = new if accumulated is None else {name: GAMMA * accumulated[name] + new[name] for name in new}
        rest = {name: p.double() for name, p in weights(model).items()}
    disturbed(model)
    moved = {name: p.double() - rest[name] for name, p in weights(model).items()}

    expected = LAMBDA / 2 * sum(float((accumulated[name] * d**2).sum()) for name, d in moved.items())
    penalty = method.penalty(model)
    assert expected > 0
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-5)
    penalty.backward()
    for name, p in model.named_parameters():
        gradient = LAMBDA * accumulated[name] * moved[name]
        torch.testing.assert_close(p.grad.double(), gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_the_first_domain_is_adamw_s_and_so_is_all_with_lambda_0(tiny_llama):
    plain, other = copy_of(tiny_llama), copy_of(tiny_llama)
    method, baseline, first = EWC(ewc_lambda=0), AdamW(), EWC()
    assert first.penalty(other) is None
    other = learn(first, other, domain(0))
    for seed in range(2):
        tiny_llama, plain = learn(method, tiny_llama, domain(seed)), learn(baseline, plain, domain(seed))
        assert same(weights(tiny_llama), weights(plain))
        assert seed or same(weights(other), weights(plain))


def test_stiffer_springs_hold_what_mattered(tiny_llama):
    stretched = []
    for stiffness in (0.0, 1e2, 1e4):
        method, model = EWC(ewc_lambda=stiffness), copy_of(tiny_llama)
        model = learn(method, model, domain(0), lr=1e-3)
        fisher, before = method.fisher, weights(model)
        model = learn(method, model, domain(1), lr=1e-3, steps=12)
        stretched.append(sum(float((fisher[n] * (p - before[n]) ** 2).sum()) for n, p in weights(model).items()))
    assert stretched[0] > 1.3 * stretched[1] > 1.3 * 1.3 * stretched[2]


def test_a_protected_text_is_a_domain_before_the_first(tiny_llama):
    method, base = EWC(ewc_lambda=LAMBDA, gamma=GAMMA), weights(tiny_llama)
    torch.manual_seed(0)
    method.protect(tiny_llama, domain(3))
    text = diagonal_fisher(tiny_llama, domain(3), seed=0)
    assert same(method.fisher, text)
    assert method.penalty(tiny_llama) == 0
    assert same(weights(tiny_llama), base)
    disturbed(tiny_llama)
    assert method.penalty(tiny_llama) > 0
    tiny_llama = learn(method, tiny_llama, domain(0), steps=2)
    new = diagonal_fisher(tiny_llama, domain(0), seed=0)
    for name in text:
        torch.testing.assert_close(method.fisher[name], GAMMA * text[name] + new[name])


def test_its_memory_is_in_a_file_that_is_checked(tiny_llama, tmp_path):
    learn(EWC(), tiny_llama, domain(0), steps=1, folder=tmp_path)
    path = tmp_path / "fisher.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"fisher\.safetensors: not a readable fisher file"):
        EWC().restore(tiny_llama, [tmp_path])
