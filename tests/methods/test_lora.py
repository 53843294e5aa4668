from __future__ import annotations

import pytest
import torch
from cases.methods import copy_of, domain, learn, same, weights

from benchmarks.arena import LoRAWeightDecay
from sparse_cl.methods import LoRA
from sparse_cl.methods.lora import MergedWeights, merged


@pytest.mark.parametrize(("method", "decay"), [(LoRA, 0.01), (LoRAWeightDecay, 0.3)])
def test_a_step_without_gradient_shrinks_a_and_b_and_leaves_the_base(tiny_llama, method, decay):
    made = method()
    model = learn(made, tiny_llama, domain(0))
    before = weights(model)
    optimizer = made.make_optimizer(model, lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    after = weights(model)
    for name, p in before.items():
        expected = p * (1 - 0.1 * decay) if "lora_" in name else p
        torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=0)
        assert "lora_" not in name or p.any()


def test_decay_alone_tells_them_apart(tiny_llama):
    first = learn(LoRA(rank=4, weight_decay=0.3), copy_of(tiny_llama), domain(0))
    second = learn(LoRAWeightDecay(rank=4), copy_of(tiny_llama), domain(0))
    assert same(weights(first), weights(second))
    third = learn(LoRA(rank=4), copy_of(tiny_llama), domain(0))
    assert not same(weights(first), weights(third))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_those_that_merging_leaves(tiny_llama, dtype):
    model = tiny_llama.to(dtype)
    base = {name: p for name, p in model.named_parameters() if "proj" in name}
    adapted = learn(LoRA(rank=4), model, domain(0))
    learned = MergedWeights(adapted, base)
    found = {name: learned[name].clone() for name in learned}
    before = {name: p.detach().clone() for name, p in base.items()}
    after = merged(adapted)
    assert len(learned) == len(base) == 14
    for name, weight in found.items():
        assert torch.equal(weight, after.get_parameter(name))
        assert not torch.equal(weight, before[name])
