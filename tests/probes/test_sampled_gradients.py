"""Gradients with sampled labels: unbiased for the Fisher, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_cl.probes.sampled_gradients import sampled_gradients


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()


def exact_fisher(model, batches):
    """Σ_x Σ_y p(y|x) (∂ log p(y|x))², every label in turn, by parameter."""
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for x in torch.cat(batches):
        chances = model(x[None])[0].log_softmax(-1)
        for chance in chances:
            gradients = torch.autograd.grad(chance, list(parameters.values()), retain_graph=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                sums[name] += chance.exp().detach() * gradient.square()
    return sums


def test_squares_of_a_batch_s_gradient_estimate_the_sum_over_its_tokens():
    model = classifier()
    batches = list(torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def see(gradients):
        for name, gradient in gradients.items():
            sums[name] += gradient.square()

    samples = 1500
    assert sampled_gradients(model, dict(model.named_parameters()), batches, see, samples=samples) == 12
    for name, expected in exact_fisher(model, batches).items():
        torch.testing.assert_close(sums[name] / samples, expected, rtol=0.2, atol=0.05 * float(expected.max()))
        assert float((sums[name] / samples).sum() / expected.sum()) == pytest.approx(1, abs=0.04)


def test_one_seed_gives_the_same_labels_and_nothing_is_left_behind():
    model = classifier().train()
    model[0].weight.requires_grad_(False)
    batches, runs = [torch.ones(2, 3, dtype=torch.float64)], []
    for seed in (0, 0, 1):
        runs.append([])
        named = {"first": model[0].weight, "last": model[2].bias}
        sampled_gradients(model, named, batches, lambda g, own=runs[-1]: own.append(g), seed=seed)
    assert set(runs[0][0]) == {"first", "last"}
    assert torch.equal(runs[0][0]["first"], runs[1][0]["first"])
    assert not torch.equal(runs[0][0]["first"], runs[2][0]["first"])
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_that_is_not_reached_is_left_out(tiny_llama):
    other, seen = nn.Parameter(torch.ones(2)), []
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[-100, 2, 3]])}
    named = {"other": other, "norm": tiny_llama.model.norm.weight}
    assert sampled_gradients(tiny_llama, named, [batch], seen.append) == 2
    assert [set(gradients) for gradients in seen] == [{"norm"}]


def test_what_cannot_be_sampled(tiny_llama):
    named = {"norm": tiny_llama.model.norm.weight}
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.full((1, 3), -100)}
    for arguments, message in (
        ((named, []), "no batch; is the domain empty"),
        ((named, [batch]), "got 1 without any"),
        (({}, [batch]), "parameters: expected at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            sampled_gradients(tiny_llama, *arguments, lambda gradients: None)
    with pytest.raises(ValueError, match="samples: expected at least 1, got 0"):
        sampled_gradients(tiny_llama, named, [batch], lambda gradients: None, samples=0)
    with torch.no_grad():
        tiny_llama.model.norm.weight[0] = float("nan")
    whole = {"input_ids": torch.tensor([[1, 2, 3]])}
    with pytest.raises(ValueError, match="logits that are not finite in batch 1"):
        sampled_gradients(tiny_llama, named, [whole], lambda gradients: None)
    assert tiny_llama.model.norm.weight.requires_grad
