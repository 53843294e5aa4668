"""Means of weights, against what was trained."""

from __future__ import annotations

import pytest
import torch
from cases.methods import copy_of, domain, learn, weights

from benchmarks.arena import SFA, LoRAMean
from sparse_cl.methods import AdamW


@pytest.mark.parametrize("mean", ["pair", "running"])
def test_sfa_is_adamw_s_weights_averaged_with_those_before(tiny_llama, mean):
    method, plain, model = SFA(mean=mean), copy_of(tiny_llama), tiny_llama
    seen = [weights(plain)]
    for number in range(3):
        plain.load_state_dict(model.state_dict())
        after = weights(learn(AdamW(), plain, domain(number)))
        model = learn(method, model, domain(number))
        share = 0.5 if mean == "pair" else (number + 1) / (number + 2)
        for name, found in weights(model).items():
            expected = share * seen[-1][name].double() + (1 - share) * after[name].double()
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
        seen.append(weights(model))
    with pytest.raises(ValueError, match="mean: expected 'pair' or 'running', got 'half'"):
        SFA(mean="half")


def test_adapters_that_learned_apart_are_averaged(tiny_llama):
    base, method, model = copy_of(tiny_llama), LoRAMean(), tiny_llama
    changes = []
    for number in range(3):
        alone = weights(learn(LoRAMean(), copy_of(base), domain(number)))
        changes.append({name: value.double() - weights(base)[name].double() for name, value in alone.items()})
        model = learn(method, model, domain(number))
    assert any(change.any() for change in changes[1].values())
    for name, found in weights(model).items():
        expected = weights(base)[name].double() + sum(change[name] for change in changes) / 3
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
