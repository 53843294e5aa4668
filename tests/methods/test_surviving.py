"""Gradients of a new domain, shown one at a time, and the share of them that a method lets through."""

from __future__ import annotations

import pytest
import torch
from cases.methods import copy_of, domain, gradients_of

from sparse_cl.methods.surviving import each_gradient, surviving_shares

BATCHES = domain(1, count=6)
LOOKED_AT = 4
HALVES = 2 * LOOKED_AT


def matrices(model):
    return {name: p for name, p in model.named_parameters() if p.dim() == 2 and "proj" in name}


def test_each_gradient_is_that_of_the_loss(tiny_llama):
    expected, seen = gradients_of(tiny_llama, BATCHES[:LOOKED_AT]), {}
    watched = matrices(tiny_llama)
    each_gradient(tiny_llama, watched, BATCHES, lambda name, g: seen.setdefault(name, []).append(g.clone()))
    assert seen.keys() == watched.keys()
    for name, found in seen.items():
        torch.testing.assert_close(torch.stack(found), expected[name], rtol=1e-5, atol=1e-7)


def test_no_gradient_is_held_while_the_next_one_is_shown(tiny_llama):
    held = []
    each_gradient(
        tiny_llama,
        matrices(tiny_llama),
        BATCHES,
        lambda name, gradient: held.append([n for n, p in tiny_llama.named_parameters() if p.grad is not None]),
    )
    assert held == [[]] * (HALVES * len(matrices(tiny_llama)))


def test_shares_weigh_batches_by_their_energy(tiny_llama):
    watched = matrices(tiny_llama)
    gradients = {name: g.double() for name, g in gradients_of(tiny_llama, BATCHES[:LOOKED_AT]).items()}

    def in_first_row(name, gradient):
        squares = gradient.double().square()
        return float(squares[0].sum() / squares.sum())

    shares = surviving_shares(tiny_llama, watched, BATCHES, in_first_row)
    for name in watched:
        squares = gradients[name].square()
        assert shares[name] == pytest.approx(float(1 - squares[:, 0].sum() / squares.sum()), rel=1e-5)


def test_a_weight_that_the_loss_does_not_reach_loses_nothing(tiny_llama):
    watched = {"head": tiny_llama.lm_head.weight, "unused": torch.nn.Parameter(torch.ones(2, 2))}
    assert surviving_shares(tiny_llama, watched, BATCHES, lambda name, gradient: 0.5) == {"head": 0.5, "unused": 1.0}


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_what_is_not_finite_is_named_and_all_is_put_back(tiny_llama, what):
    tiny_llama.train()
    frozen = tiny_llama.model.norm.weight.requires_grad_(False)
    tiny_llama.lm_head.weight.grad = kept = torch.ones_like(tiny_llama.lm_head.weight)
    before = copy_of(tiny_llama)
    if what == "loss":
        with torch.no_grad():
            tiny_llama.lm_head.weight[0, 0] = float("nan")
    else:
        tiny_llama.model.layers[0].mlp.down_proj.register_full_backward_hook(
            lambda module, inputs, outputs: (inputs[0] * float("nan"),)
        )
    name = "model.layers.0.mlp.up_proj.weight"
    expected = "the loss is not finite in batch 1" if what == "loss" else f"the gradient of {name} is not finite in"
    with pytest.raises(ValueError, match=f"{expected}.*look at that batch"):
        each_gradient(tiny_llama, {name: tiny_llama.get_parameter(name)}, BATCHES, lambda name, gradient: None)
    assert tiny_llama.training
    assert [p for p in tiny_llama.parameters() if not p.requires_grad] == [frozen]
    assert [p for p in tiny_llama.parameters() if p.grad is not None] == [tiny_llama.lm_head.weight]
    assert tiny_llama.lm_head.weight.grad is kept
    assert not tiny_llama.get_parameter(name)._post_accumulate_grad_hooks
    torch.testing.assert_close(tiny_llama.get_parameter(name), before.get_parameter(name), rtol=0, atol=0)
