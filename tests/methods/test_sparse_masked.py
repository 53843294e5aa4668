from __future__ import annotations

import pytest
import torch
import transformers

from sparse_cl.methods import SparseMasked
from sparse_cl.models.parts import find_mlps, is_transposed
from sparse_cl.nn import ActiveLinear

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
GLU = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 2, "pad_token_id": 0}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**GLU, mlp_bias=True),
    "qwen2": lambda: transformers.Qwen2Config(**GLU),
    "qwen3": lambda: transformers.Qwen3Config(**GLU, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**GLU),
    "gemma": lambda: transformers.GemmaConfig(**GLU, head_dim=8),
    "phi3": lambda: transformers.Phi3Config(**GLU),
    "opt": lambda: transformers.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, pad_token_id=0),
    "phi": lambda: transformers.PhiConfig(**SIZES, intermediate_size=24, pad_token_id=0),
    "gpt2": lambda: transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_inner=24, vocab_size=50),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=24),
}
PLANTED = torch.tensor([1, 8, 23])
BATCHES = [
    {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "labels": torch.tensor([[5, 6, 7, 8], [9, 10, -100, -100]]),
    }
]


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(FAMILIES[request.param]()).float()


def rows_into(mlp):
    """Weights into the neurons, (outputs, hidden), views that write through."""
    return [layer.weight.T if is_transposed(layer) else layer.weight for layer in mlp.into.values()]


def plant(model):
    with torch.no_grad():
        for mlp in find_mlps(model):
            for weight in rows_into(mlp):
                weight[PLANTED] *= 100
                if mlp.layout.stacked:
                    weight[PLANTED + mlp.neurons] *= 100
            for layer in mlp.into.values():
                if layer.bias is not None:
                    layer.bias[PLANTED] += 50  # a ReLU could be off for every token


def test_training_changes_the_planted_neurons_and_nothing_else(model):
    plant(model)
    frozen = next(iter(dict(model.named_parameters())))
    model.get_parameter(frozen).requires_grad_(False)
    method = SparseMasked(fraction=3 / 24)
    method.before_domain(model, BATCHES)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    active = [layer for layer in model.modules() if isinstance(layer, ActiveLinear)]
    assert all(layer.weight.grad is None and not layer.weight.requires_grad for layer in active)
    optimizer = method.make_optimizer(model, lr=1e-2)
    for _ in range(3):
        model(**BATCHES[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    method.after_domain(model, BATCHES)
    assert not any(isinstance(layer, ActiveLinear) for layer in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [frozen]
    linear = [layer for mlp in find_mlps(model) for layer in (*mlp.into.values(), mlp.out)]
    biased = [layer for mlp in find_mlps(model) for layer in mlp.into.values() if layer.bias is not None]
    assert {*active} == {layer for layer in linear if not is_transposed(layer) and layer not in biased}
    changed = {name: p.detach() != before[name] for name, p in model.named_parameters()}

    neurons = torch.zeros(24, dtype=torch.bool)
    neurons[PLANTED] = True
    inside = set()
    for mlp in find_mlps(model):
        for name, layer in mlp.into.items():
            outputs = neurons.repeat(2) if mlp.layout.stacked else neurons
            weight = changed[f"{name}.weight"]
            assert torch.equal(weight.any(0 if is_transposed(layer) else 1), outputs)
            inside.add(f"{name}.weight")
            if layer.bias is not None:
                assert torch.equal(changed[f"{name}.bias"], outputs)
                inside.add(f"{name}.bias")
        weight = changed[f"{mlp.out_name}.weight"]
        assert torch.equal(weight.any(1 if is_transposed(mlp.out) else 0), neurons)
        inside.add(f"{mlp.out_name}.weight")
    assert not any(change.any() for name, change in changed.items() if name not in inside)


def test_masks_are_those_of_the_mean_activation_of_all_tokens():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]()).train()
    method = SparseMasked(fraction=0.25)
    method.before_domain(model, BATCHES)
    inputs = []
    layer = model.model.layers[1]
    handle = layer.mlp.register_forward_hook(lambda m, args, out: inputs.append(args[0]))
    model.eval()
    with torch.no_grad():
        model(input_ids=BATCHES[0]["input_ids"], attention_mask=BATCHES[0]["attention_mask"])
        handle.remove()
        x = inputs[0][BATCHES[0]["attention_mask"].bool()]
        mean = (torch.nn.functional.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)).double().abs().mean(0)
    expected = mean.argsort(descending=True)[:6].sort().values
    for name in ("gate_proj.weight", "up_proj.bias", "down_proj.weight"):
        assert method.masks[f"model.layers.1.mlp.{name}"].index.tolist() == expected.tolist()


def test_a_new_domain_frees_other_neurons():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    method = SparseMasked(fraction=0.1)
    method.before_domain(model, BATCHES)
    first = {name: mask.to_dense() for name, mask in method.masks.items()}
    plant(model)
    method.before_domain(model, BATCHES)
    assert any(not torch.equal(first[name], mask.to_dense()) for name, mask in method.masks.items())


def test_a_quantized_layer_is_refused_before_anything_runs():
    class Quantized(torch.nn.Linear):
        def __init__(self):
            super().__init__(8, 4)
            self.weight = torch.nn.Parameter(torch.zeros(16, 1))

    model = torch.nn.Module()
    model.mlp = torch.nn.Module()
    model.mlp.fc1, model.mlp.fc2 = torch.nn.Linear(4, 8), Quantized()
    with pytest.raises(ValueError, match=r"mlp\.fc2 is a Quantized without a plain weight matrix.*unquantized"):
        SparseMasked().check(model)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5])
def test_a_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        SparseMasked(fraction)


def test_no_token_is_an_error(tiny_llama):
    with pytest.raises(ValueError, match="is the domain empty"):
        SparseMasked().before_domain(tiny_llama, [])
