"""Masks that free neurons, in each layout of weights."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_cl import ColumnMask, RowMask
from sparse_cl.models.neuron_masks import neuron_count, neuron_masks, output_places, places, top_neurons
from sparse_cl.models.parts import find_mlps

NEURONS = torch.tensor([1, 8, 23])
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
GLU = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 2, "pad_token_id": 0}
CONFIGS = {
    "llama with biases": transformers.LlamaConfig(**GLU, mlp_bias=True),
    "phi3": transformers.Phi3Config(**GLU),
    "gpt2": transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_inner=24, vocab_size=50),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES, intermediate_size=24),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_entries_are_free_exactly_where_they_belong_to_a_chosen_neuron(config):
    """A neuron's entries are those on which, of all hidden activations, only its own depends, or that only weigh it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).double()
    (mlp,) = find_mlps(model)
    masks = neuron_masks(places(mlp), NEURONS)
    module = model.get_submodule(mlp.name)
    seen = []
    mlp.out.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    output = module(torch.randn(5, 16, dtype=torch.float64))
    others = torch.ones(24, dtype=torch.bool)
    others[NEURONS] = False
    parameters = dict(module.named_parameters(mlp.name))
    into = {name: p for name, p in parameters.items() if not name.startswith(mlp.out_name)}
    assert masks.keys() == {*into, f"{mlp.out_name}.weight"}
    for neurons, free in ((NEURONS, True), (others.nonzero().flatten(), False)):
        gradients = torch.autograd.grad(seen[0][:, neurons].square().sum(), list(into.values()), retain_graph=True)
        for name, gradient in zip(into, gradients, strict=True):
            assert torch.equal(gradient != 0, masks[name].to_dense() == free)
    # Entries of the layer out see an activation: gradients of the output vanish with the neuron's activation.
    (gradient,) = torch.autograd.grad(output.sum(), [mlp.out.weight])
    scale = torch.ones(24, dtype=torch.float64)
    scale[NEURONS] = 0
    again = mlp.out(seen[0].detach() * scale)
    (silenced,) = torch.autograd.grad(again.sum(), [mlp.out.weight])
    assert torch.equal((gradient != 0) & (silenced == 0), masks[f"{mlp.out_name}.weight"].to_dense())


def test_kinds_follow_how_weights_lie():
    gpt2, llama = (
        transformers.AutoModelForCausalLM.from_config(CONFIGS[name]) for name in ("gpt2", "llama with biases")
    )
    kinds = {name: type(mask) for name, mask in neuron_masks(places(find_mlps(gpt2)[0]), NEURONS).items()}
    assert kinds == {
        "transformer.h.0.mlp.c_fc.weight": ColumnMask,
        "transformer.h.0.mlp.c_fc.bias": RowMask,
        "transformer.h.0.mlp.c_proj.weight": RowMask,
    }
    masks = neuron_masks(places(find_mlps(llama)[0]), NEURONS)
    kinds = {name.rpartition("mlp.")[2]: type(mask) for name, mask in masks.items()}
    assert kinds["gate_proj.weight"] is kinds["up_proj.weight"] is kinds["up_proj.bias"] is RowMask
    assert kinds["down_proj.weight"] is ColumnMask


def test_a_layer_without_a_plain_matrix_is_named():
    layer = nn.Linear(4, 8)
    layer.weight = nn.Parameter(torch.zeros(16, 1))
    with pytest.raises(ValueError, match="fc1 is a Linear without a plain weight matrix"):
        output_places("fc1", layer)


@given(st.integers(1, 400), st.floats(1e-9, 1.0))
def test_the_count_is_a_rounded_share_and_never_none(width, fraction):
    count = neuron_count(fraction, width)
    assert 1 <= count <= width
    assert abs(count - fraction * width) <= 0.5 or count == 1
    assert top_neurons(torch.arange(float(width)).flip(0), fraction).tolist() == list(range(count))


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5])
def test_a_share_out_of_range(fraction):
    more = "which is 36 of a layer's 24 neurons" if fraction > 1 else ""
    with pytest.raises(ValueError, match=rf"fraction: expected a share .* in \(0, 1\], got {fraction}.*{more}"):
        neuron_count(fraction, 24)
