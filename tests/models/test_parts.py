"""The parts of transformers that probes watch, in each family of models."""

import pytest
import torch
import transformers
from cases.families import FAMILIES, MIXTURES, make
from torch import nn

from sparse_cl.models.parts import find_attentions, find_blocks, find_mlps, linear_layers, matrix_of, shape_of, spread


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return make(request.param, FAMILIES[request.param])


def test_every_block_has_its_attention_and_its_mlp(model):
    blocks = find_blocks(model)
    assert [block.name.rpartition(".")[2] for block in blocks] == ["0", "1"]
    for block in blocks:
        assert block.mlp.neurons == 24
        assert shape_of(block.attention.out) == shape_of(block.mlp.out)[:1] + (16,)
        assert model.get_submodule(block.name) is block.module
    assert [block.mlp for block in blocks] == find_mlps(model)
    assert [block.attention for block in blocks] == find_attentions(model)


def test_linear_layers_are_all_of_the_blocks_and_none_besides(model):
    layers = linear_layers(model)
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    own = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and m is not model.get_output_embeddings()}
    assert layers == own
    assert all(tuple(matrix_of(layer, name).shape) == shape_of(layer) for name, layer in layers.items())


def test_what_enters_the_layer_out_of_the_neurons_is_found_by_hand(model):
    """The neurons' activations, computed from the layers named here, are what the block's MLP really uses."""
    mlp = find_mlps(model)[0]
    seen = {}
    handles = [
        layer.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
        for name, layer in {**mlp.into, mlp.out_name: mlp.out}.items()
    ]
    model(torch.arange(10)[None])
    for handle in handles:
        handle.remove()
    outputs = [seen[name][1] for name in mlp.into]
    if mlp.layout.stacked:
        outputs = list(outputs[0].chunk(2, dim=-1))
    expected = mlp.activation(outputs[0])
    if len(outputs) == 2:
        expected = expected * outputs[1]
    torch.testing.assert_close(seen[mlp.out_name][0].flatten(0, -2), expected.flatten(0, -2))


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_of_experts_is_named_as_not_supported(family):
    with pytest.raises(ValueError, match=rf"{family}ForCausalLM is a mixture of experts .*dense model"):
        find_mlps(make(family, MIXTURES[family]))


def test_a_model_without_parts_is_told_what_was_looked_for():
    with pytest.raises(ValueError, match=r"Sequential has no MLP .*gate_proj \+ up_proj.*are called: 0, 2"):
        find_mlps(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))


def test_an_mlp_outside_any_block_is_no_block():
    model = nn.Module()
    model.fc1, model.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
    model.q_proj, model.k_proj, model.v_proj, model.dense = (nn.Linear(4, 4) for _ in range(4))
    assert len(find_mlps(model)) == len(find_attentions(model)) == 1
    with pytest.raises(ValueError, match="no residual blocks"):
        find_blocks(model)


def test_adapted_layers_are_watched_but_have_no_matrix(tiny_llama):
    import peft

    adapted = peft.get_peft_model(tiny_llama, peft.LoraConfig(r=2, target_modules=["down_proj"]))
    mlp = find_mlps(adapted)[0]
    assert mlp.neurons == 24
    with pytest.raises(ValueError, match=r"down_proj is a Linear without a plain weight .*merge_and_unload"):
        matrix_of(mlp.out, mlp.out_name)


def test_a_part_that_is_no_linear_layer_is_named():
    model = nn.Module()
    model.fc1, model.fc2 = nn.Linear(4, 8), nn.Embedding(8, 4)
    with pytest.raises(ValueError, match="fc2 is a Embedding, where a torch.nn.Linear"):
        find_mlps(model)


def test_blocks_are_spread_evenly_from_the_first_to_the_last():
    assert spread(range(9), 3) == [0, 4, 8]
    assert spread(range(32), 8) == [0, 4, 9, 13, 18, 22, 27, 31]
    assert spread(range(3), 8) == [0, 1, 2]
    assert spread(range(5), 1) == [2]
    with pytest.raises(ValueError, match="count: expected at least 1 block, got 0"):
        spread(range(5), 0)


def test_a_model_that_sees_has_the_blocks_of_its_text_decoder():
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        text_config={**text, "num_key_value_heads": 2, "vocab_size": 64},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
    )
    blocks = find_blocks(transformers.Gemma3ForConditionalGeneration(config))
    assert [block.name.split(".")[-3:] for block in blocks] == [["language_model", "layers", n] for n in "01"]
