"""Penalties against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from cases.methods import domain, learn, weights

from benchmarks.arena import L2SP, KFACLaplace, KFACRows
from sparse_cl.probes.curvature import CurvatureProbe
from sparse_cl.probes.fisher import diagonal_fisher


def disturb(model):
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))


def test_l2_sp_pulls_to_where_the_domain_began(tiny_llama):
    method, before = L2SP(alpha=3.0), weights(tiny_llama)
    method.before_domain(tiny_llama, domain(0))
    assert method.penalty(tiny_llama) == 0
    disturb(tiny_llama)
    moved = {name: value.double() - before[name].double() for name, value in weights(tiny_llama).items()}
    penalty = method.penalty(tiny_llama)
    assert float(penalty.detach()) == pytest.approx(
        1.5 * sum(float(d.square().sum()) for d in moved.values()), rel=1e-5
    )
    penalty.backward()
    for name, p in tiny_llama.named_parameters():
        torch.testing.assert_close(p.grad.double(), 3 * moved[name], rtol=1e-4, atol=1e-7)


def test_kfac_s_penalty_is_that_of_the_summed_factors(tiny_llama):
    method, model, sums, rest = KFACLaplace(ewc_lambda=7.0), tiny_llama, {}, {}
    for number in range(2):
        model = learn(method, model, domain(number), steps=2)
        torch.manual_seed(0)
        for name, new in CurvatureProbe(model).run(domain(number)).layers.items():
            s, a = sums.get(f"{name}.weight", (0, 0))
            sums[f"{name}.weight"] = s + new.outputs.double(), a + new.inputs.double()
        for name, new in diagonal_fisher(model, domain(number), seed=0).items():
            rest[name] = rest.get(name, 0) + new.double()
    before = {name: value.double() for name, value in weights(model).items()}
    disturb(model)
    expected = 0.0
    for name, value in weights(model).items():
        d = value.double() - before[name]
        if name in sums:
            s, a = sums[name]
            expected += float(torch.einsum("ij,jk,kl,il->", s, d, a, d))
        else:
            expected += float((rest[name] * d.square()).sum())
    penalty = method.penalty(model)
    assert float(penalty.detach()) == pytest.approx(7 / 2 * expected, rel=1e-4)
    penalty.backward()
    for name, p in model.named_parameters():
        d = p.detach().double() - before[name]
        gradient = 7 * (sums[name][0] @ d @ sums[name][1] if name in sums else rest[name] * d)
        torch.testing.assert_close(p.grad.double(), gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_kfac_with_moments_of_rows_has_them_from_the_second_domain_on(tiny_llama):
    method = KFACRows()
    assert type(method.make_optimizer(method.before_domain(tiny_llama, domain(0)), 1e-3)) is torch.optim.AdamW
    model = learn(method, tiny_llama, domain(0), steps=2)
    optimizer = method.make_optimizer(method.before_domain(model, domain(1)), 1e-3)
    assert {group["second_moment"] for group in optimizer.param_groups} == {"row"}
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
