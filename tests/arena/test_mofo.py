from __future__ import annotations

import pytest
import torch
from cases.methods import copy_of, domain, learn, weights
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.arena import MoFO
from benchmarks.arena.mofo import MoFOAdamW
from sparse_cl.methods import AdamW

LR, DECAY = 1e-2, 0.1


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    fraction=st.floats(0.01, 1.0),
    seed=st.integers(0, 50),
)
def test_only_the_largest_momenta_are_stepped_and_the_rest_decays(shape, fraction, seed):
    generator = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    optimizer = MoFOAdamW([p], lr=LR, weight_decay=DECAY, fraction=fraction)
    m, v = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for step in range(1, 4):
        before = p.detach().clone()
        p.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        m, v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad**2
        optimizer.step()
        count = max(1, int(fraction * p.numel()))
        top = set(sorted(range(p.numel()), key=lambda i: -float(m.flatten()[i].abs()))[:count])
        rest = torch.tensor([i not in top for i in range(p.numel())]).reshape(shape)
        decayed = before * (1 - LR * DECAY)
        assert torch.equal(p.detach()[rest], decayed[rest])
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        torch.testing.assert_close(p.detach()[~rest], (decayed - LR * update)[~rest], rtol=1e-12, atol=1e-14)


def test_with_all_of_them_it_is_adamw(tiny_llama):
    plain = copy_of(tiny_llama)
    method, baseline = MoFO(fraction=1.0), AdamW()
    for seed in range(2):
        tiny_llama, plain = learn(method, tiny_llama, domain(seed)), learn(baseline, plain, domain(seed))
    expected = weights(plain)
    for name, p in weights(tiny_llama).items():
        torch.testing.assert_close(p, expected[name], rtol=1e-4, atol=1e-5)


def test_in_a_model_a_step_moves_the_fraction_of_each_matrix(tiny_llama):
    states = [weights(tiny_llama)]
    method = MoFO(fraction=0.25, weight_decay=0.0)
    learn(method, tiny_llama, domain(0), steps=2, each_step=lambda model: states.append(weights(model)))
    for name, before in states[1].items():
        moved = int((states[2][name] != before).sum())
        if before.dim() == 1:
            assert moved == before.numel(), "norms are stepped whole"
        elif "embed" not in name:  # of the embeddings many have no gradient at all
            assert moved <= before.numel() // 4
            assert moved >= 0.9 * (before.numel() // 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_moments_are_float32_and_all_of_them_are_kept(dtype):
    p = torch.nn.Parameter(torch.ones(4, 8, dtype=dtype))
    optimizer = MoFOAdamW([p], lr=0.1, fraction=0.1, weight_decay=0.0)
    p.grad = torch.arange(1, 33).reshape(4, 8).to(dtype)
    optimizer.step()
    state = optimizer.state[p]
    torch.testing.assert_close(state["exp_avg"], 0.1 * p.grad.float())
    assert state["exp_avg_sq"].dtype == torch.float32
    assert int((p != 1).sum()) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_state_dict_is_gone_on_from_with_the_same_bits(dtype):
    def stepped(p, optimizer, seeds):
        for seed in seeds:
            p.grad = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
            optimizer.step()

    p = torch.nn.Parameter(torch.ones(4, 8, dtype=dtype))
    optimizer = MoFOAdamW([p], lr=0.1, fraction=0.2)
    stepped(p, optimizer, range(3))
    q = torch.nn.Parameter(p.detach().clone())
    other = MoFOAdamW([q], lr=0.1, fraction=0.2)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[q]["exp_avg"].dtype == torch.float32
    assert other.state[q]["exp_avg"] is not optimizer.state[p]["exp_avg"]
    stepped(p, optimizer, range(3, 6))
    stepped(q, other, range(3, 6))
    assert torch.equal(p, q)
