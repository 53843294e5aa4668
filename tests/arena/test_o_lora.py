from __future__ import annotations

import pytest
import torch
from cases.methods import copy_of, domain, learn, logits, weights
from safetensors.torch import load_file

from benchmarks.arena import OLoRA

LAMBDA_1, LAMBDA_2 = 0.5, 0.1


def adapter_of(folder):
    """Name of the layer -> A and B in float64, as PEFT saved them."""
    tensors = {name: t.double() for name, t in load_file(folder / "adapter_model.safetensors").items()}
    layers = {name.partition(".lora_")[0] for name in tensors}
    return {layer: tuple(tensors[f"{layer}.lora_{part}.weight"] for part in "AB") for layer in layers}


@pytest.fixture
def third(tiny_llama, tmp_path):
    """The base's weights, the method and the model in the third domain, and the folders of the first two."""
    base, method, model = weights(tiny_llama), OLoRA(rank=4, alpha=8, lambda_1=LAMBDA_1, lambda_2=LAMBDA_2), tiny_llama
    folders = [tmp_path / str(number) for number in range(2)]
    for number, folder in enumerate(folders):
        model = learn(method, model, domain(number), folder=folder)
    return base, method, method.before_domain(model, domain(2)), folders


def test_the_penalty_is_the_overlap_with_all_earlier_adapters_and_the_norms(third):
    _, method, model, folders = third
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(0.1)
    new = {name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad}
    expected, layers = 0.0, 0
    for folder in folders:
        for layer, (old, _) in adapter_of(folder).items():
            a = new[f"{layer}.lora_A.default.weight"]
            expected += LAMBDA_1 * sum(abs(float(x @ y)) for x in old for y in a)
            layers += 1
    assert layers == 2 * 14
    expected += LAMBDA_2 * sum(float((p**2).sum() ** 0.5) for p in new.values())
    assert float(method.penalty(model).detach()) == pytest.approx(expected, rel=1e-5)


def test_a_fresh_adapter_s_penalty_has_a_finite_gradient(third):
    _, method, model, _ = third
    method.penalty(model).backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == ("lora_" not in name)
        assert p.grad is None or p.grad.isfinite().all()


def test_earlier_adapters_stay_active_and_no_bit_of_them_changes(third):
    base, method, model, folders = third
    before = weights(model)
    for name, p in base.items():
        merged = p.double()
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        for a, b in (adapter[layer] for adapter in map(adapter_of, folders) if layer in adapter):
            merged = merged + 2.0 * b @ a  # alpha / rank
        own = before.get(f"{layer}.base_layer.weight", before.get(f"base_model.model.{name}"))
        torch.testing.assert_close(own.double(), merged, rtol=1e-5, atol=1e-6)
    model = learn(method, model, domain(2))
    frozen = [name for name in before if "lora_" not in name]
    after = weights(model)
    assert len(frozen) == len(base)
    assert all(torch.equal(before[name], after[name]) for name in frozen)


def test_a_fresh_adapter_changes_no_output(third):
    _, _, model, _ = third
    with model.disable_adapter():
        expected = logits(model, domain(2))
    assert torch.equal(logits(model, domain(2)), expected)


def test_the_overlap_falls_with_its_weight(tiny_llama, tmp_path):
    overlaps = []
    for lambda_1 in (0.0, 5.0):
        method, model = OLoRA(rank=4, lambda_1=lambda_1), copy_of(tiny_llama)
        folders = [tmp_path / f"{lambda_1}-{number}" for number in range(2)]
        for number, folder in enumerate(folders):
            model = learn(method, model, domain(number), steps=10, folder=folder)
        old, new = map(adapter_of, folders)
        overlaps.append(sum(float((old[layer][0] @ new[layer][0].T).abs().sum()) for layer in old))
    assert overlaps[1] < overlaps[0] / 2


def test_without_weights_there_is_no_penalty(tiny_llama):
    method = OLoRA(lambda_1=0, lambda_2=0)
    model = learn(method, tiny_llama, domain(0), steps=1)
    assert method.penalty(method.before_domain(model, domain(1))) is None
