from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_cl.probes.fisher import diagonal_fisher


class Bigram(nn.Module):
    """Logits of the next token from the present one, through a hidden layer; float64."""

    def __init__(self, vocabulary=5, width=3):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary)
        self.unused = nn.Parameter(torch.ones(2))
        self.double()

    def forward(self, input_ids, attention_mask=None):
        return self.head(torch.tanh(self.embedding(input_ids)))


BATCHES = [
    {
        "input_ids": torch.tensor([[1, 2, 3, 4], [2, 2, 1, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, 2, 3, 4], [-100, -100, 1, -100]]),
    },
    {
        "input_ids": torch.tensor([[4, 3, 3]]),
        "attention_mask": torch.tensor([[1, 1, 1]]),
        "labels": torch.tensor([[-100, 3, 3]]),
    },
]
#: (batch, sequence, place) of the tokens from which an answer token is predicted.
PREDICTING = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 1), (1, 0, 0), (1, 0, 1)]


def exact(model):
    """Σ_y p(y) (∂ ln p(y) / ∂θ)², mean over the predicting tokens, token by token and label by label."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    held = dict(model.named_parameters())
    for number, sequence, place in PREDICTING:
        logs = model(BATCHES[number]["input_ids"][sequence : sequence + 1])[0, place].log_softmax(-1)
        for label in range(len(logs)):
            gradients = torch.autograd.grad(logs[label], list(held.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(held, gradients, strict=True):
                if gradient is not None:
                    total[name] += float(logs[label].detach().exp()) * gradient**2
    return {name: value / len(PREDICTING) for name, value in total.items()}


def test_on_average_it_is_the_fisher_information_of_each_token():
    model = Bigram()
    seeds = 200
    draws = [diagonal_fisher(model, BATCHES, seed=seed) for seed in range(seeds)]
    for name, expected in exact(model).items():
        values = torch.stack([draw[name] for draw in draws])
        error = (values.mean(0) - expected).abs()
        assert (error <= 4 * values.std(0) / seeds**0.5 + 1e-12).all()
    assert not draws[0]["unused"].any()


def test_it_is_the_squared_gradient_of_each_sequence_s_drawn_labels():
    model = Bigram()
    found = diagonal_fisher(model, BATCHES, seed=7)
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros_like(model.head.weight)
    for number, sequence in ((0, 0), (0, 1), (1, 0)):
        places = [place for n, s, place in PREDICTING if (n, s) == (number, sequence)]
        logs = model(BATCHES[number]["input_ids"][sequence : sequence + 1])[0, places].log_softmax(-1)
        labels = torch.multinomial(logs.exp().detach(), 1, generator=generator)
        (gradient,) = torch.autograd.grad(logs.gather(1, labels).sum(), [model.head.weight])
        total += gradient**2
    torch.testing.assert_close(found["head.weight"], total / len(PREDICTING), rtol=1e-12, atol=1e-15)


def test_nothing_of_the_model_changes_and_frozen_parameters_count():
    model = Bigram().train()
    model.head.requires_grad_(False)
    found = diagonal_fisher(model, BATCHES, {"w": model.head.weight})
    assert found.keys() == {"w"}
    assert found["w"].dtype == torch.float64
    assert not found["w"].requires_grad
    assert found["w"].any()
    assert model.training
    assert not model.head.weight.requires_grad
    assert model.embedding.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_no_token_that_counts():
    with pytest.raises(ValueError, match="at least one with a token that counts"):
        diagonal_fisher(Bigram(), [])
