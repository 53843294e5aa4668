"""What all baselines and bounds promise: a run that goes on from its files ends with the same bits."""

from __future__ import annotations

import pytest
import torch
from cases.methods import copy_of, domain, learn, logits, same, weights

from sparse_cl.methods import METHODS

OTHERS = [name for name, method in METHODS.items() if method.kind != "ours"]
DOMAINS = [domain(seed, count=2) for seed in range(3)]
SMALL = {"self-replay": {"texts": 2, "length": 12}}


def of(name):
    return METHODS[name](**SMALL.get(name, {}))


@pytest.mark.parametrize("name", OTHERS)
def test_what_was_interrupted_goes_on_to_the_same_bits(tiny_llama, tmp_path, name):
    base = copy_of(tiny_llama)
    method, model = of(name), tiny_llama
    folders, seen = [], []
    for number, batches in enumerate(DOMAINS):
        folders.append(tmp_path / str(number))
        model = learn(method, model, batches, steps=2, folder=folders[-1])
        seen.append(logits(model, DOMAINS[0]))
        assert all(p.grad is None for p in model.parameters())
    assert not torch.equal(seen[0], seen[1])
    for finished in (1, 2):
        resumed = of(name)
        other = resumed.restore(copy_of(base), folders[:finished])
        # What is loaded may be the adapter beside the base, where the run had gone on with merged weights.
        torch.testing.assert_close(logits(other, DOMAINS[0]), seen[finished - 1])
        for number in range(finished, 3):
            other = learn(resumed, other, DOMAINS[number], steps=2)
        assert same(weights(other), weights(model))
        assert torch.equal(logits(other, DOMAINS[0]), seen[2])


@pytest.mark.parametrize("name", OTHERS)
def test_the_next_domain_is_learned(tiny_llama, name):
    method, model = of(name), tiny_llama
    for batches in DOMAINS[:2]:
        before = mean_loss(model, batches)
        model = learn(method, model, batches, steps=10)
        assert mean_loss(model, batches) < before - 0.1


@torch.no_grad()
def mean_loss(model, batches):
    model.eval()
    return sum(float(model(**batch).loss) for batch in batches) / len(batches)


@pytest.mark.parametrize("name", OTHERS)
def test_the_options_are_the_constructor_s_and_are_recorded(name):
    method = METHODS[name]
    made = method()
    assert set(made.settings()) == set(method.options)
    assert method(**made.settings()).settings() == made.settings()


@pytest.mark.parametrize(("share", "steps", "taken"), [(0.5, 30, 15), (0.25, 30, 8), (1.0, 30, 30), (0.1, 1, 1)])
def test_early_stopping_takes_a_share_of_the_steps(share, steps, taken):
    assert METHODS["early-stopping"](share=share).steps(steps, 1, 4) == taken


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lora", {"rank": 0}, "rank: expected a number of at least 1, got 0"),
        ("lora-wd", {"weight_decay": -0.1}, "weight_decay: expected a number of at least 0, got -0.1"),
        ("o-lora", {"lambda_1": float("nan")}, "lambda_1: expected a number of at least 0, got nan"),
        ("ewc", {"ewc_lambda": float("inf")}, "ewc_lambda: expected a number of at least 0, got inf"),
        ("ewc", {"gamma": 1.1}, r"gamma: expected a number in \[0, 1\], got 1.1"),
        ("freeze-lower", {"frozen_share": 1.0}, r"frozen_share: expected a share in \(0, 1\), got 1.0"),
        ("early-stopping", {"share": 1.5}, r"share: expected a share in \(0, 1\], got 1.5"),
        ("replay-5", {"share": 0}, r"share: expected a share in \(0, 1\), got 0"),
        ("mofo", {"fraction": 1.5}, r"fraction: expected a share in \(0, 1\], got 1.5"),
        ("migu", {"quantile": 1}, r"quantile: expected a share in \(0, 1\), got 1"),
        ("osf", {"effective_rank": 0.0}, r"effective_rank: expected a share in \(0, 1\), got 0.0"),
    ],
)
def test_numbers_out_of_range(name, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name](**options)
