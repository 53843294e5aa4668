"""Planted updates: which neurons hold them, and what falls on hubs."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.probes.smearing import smallest_share, smearing


@given(st.lists(st.just(0.0) | st.floats(1e-3, 1e6), min_size=1, max_size=40), st.floats(0.05, 0.99))
def test_the_share_is_the_smallest_that_holds_it(values, share):
    energy = torch.tensor(values, dtype=torch.float64)
    found = smallest_share(energy, share)
    if energy.sum() == 0:
        assert found is None
        return
    # By hand: take entries from the largest, the last one in part.
    wanted, taken = share * sum(values), 0.0
    for value in sorted(values, reverse=True):
        part = min(1.0, wanted / value) if value else 0.0
        taken, wanted = taken + part, wanted - part * value
        if wanted <= 0:
            break
    assert found == pytest.approx(taken / len(values), rel=1e-6, abs=1e-9)
    assert found <= share + 1e-9


@pytest.mark.parametrize("count", [1, 3, 10, 64])
def test_an_even_update_meets_the_null_and_one_neuron_counts_in_part(count):
    assert smallest_share(torch.full((count,), 2.0)) == pytest.approx(0.9)
    one = torch.zeros(count)
    one[0] = 5
    assert smallest_share(one) == pytest.approx(0.9 / count)


def changed(model, seed=0):
    after = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return after


def test_an_update_of_known_neurons_is_found_in_rows_and_columns(tiny_llama):
    after = copy.deepcopy(tiny_llama)
    mlp = after.model.layers[1].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[3] += 2.0  # 16 inputs: energy 64
        mlp.down_proj.weight[:, 3] += 1.0  # 16
        mlp.down_proj.weight[:, 7] += 2**0.5  # 32
        after.model.layers[0].self_attn.o_proj.weight[:, 5] += 1.0
    hubs = {"model.layers.1.mlp": [7, 0, 1], "model.layers.0.mlp": torch.tensor([2])}
    result = smearing(tiny_llama, after, hubs)
    spread = result.mlps["model.layers.1.mlp"]
    expected = torch.zeros(24, dtype=torch.float64)
    expected[3], expected[7] = 80.0, 32.0
    assert torch.allclose(result.energy["model.layers.1.mlp"], expected, rtol=1e-6)
    # 90 % of 112 is 100.8: all of neuron 3, and 20.8 of the 32 of neuron 7.
    assert spread.share90 == pytest.approx((1 + 20.8 / 32) / 24, rel=1e-6)
    assert spread.energy == pytest.approx(112, rel=1e-6)
    old = sum(
        getattr(tiny_llama.model.layers[1].mlp, n).weight.norm() ** 2 for n in ("gate_proj", "up_proj", "down_proj")
    )
    assert spread.relative == pytest.approx((112 / old.item()) ** 0.5, rel=1e-5)
    hub = result.hubs["model.layers.1.mlp"]
    assert (hub.hubs, hub.share_of_neurons) == (3, 3 / 24)
    assert hub.share_of_energy == pytest.approx(32 / 112, rel=1e-6)
    assert result.layers["model.layers.1.mlp.gate_proj"].share90 == pytest.approx(0.9 / 24)
    assert result.layers["model.layers.1.mlp.down_proj"].share90 == pytest.approx((1 + (43.2 - 32) / 16) / 24, rel=1e-6)
    out = result.layers["model.layers.0.self_attn.o_proj"]
    assert (out.neurons, out.share90) == (16, pytest.approx(0.9 / 16)), "heads are the columns of the layer out of them"
    still = result.layers["model.layers.1.mlp.up_proj"]
    assert (still.energy, still.share90) == (0.0, None)
    assert (result.hubs["model.layers.0.mlp"].share_of_energy, result.mlps["model.layers.0.mlp"].share90) == (
        None,
        None,
    )
    json.dumps(result.to_json(), allow_nan=False)


def test_energies_are_those_of_a_loop_over_neurons(tiny_llama):
    after = changed(tiny_llama)
    result = smearing(tiny_llama, after)
    for number in (0, 1):
        old, new = (m.model.layers[number].mlp for m in (tiny_llama, after))
        for neuron in range(24):
            energy = 0.0
            for name, row in (("gate_proj", True), ("up_proj", True), ("down_proj", False)):
                delta = (getattr(new, name).weight - getattr(old, name).weight).detach().double()
                energy += (delta[neuron] if row else delta[:, neuron]).square().sum().item()
            assert result.energy[f"model.layers.{number}.mlp"][neuron].item() == pytest.approx(energy, rel=1e-5)
    assert len(result.layers) == 14
    assert result.mlps["model.layers.0.mlp"].share90 < 0.9
    assert result.hubs == {}


def test_weights_by_name_are_as_good_as_a_module(tiny_llama):
    after = changed(tiny_llama)
    weights = {name: p.detach().clone() for name, p in tiny_llama.named_parameters()}
    assert smearing(weights, after).to_json() == smearing(tiny_llama, after).to_json()


@pytest.mark.parametrize(
    ("family", "into", "out"), [("GPT2", ("c_fc",), "c_proj"), ("Phi3", ("gate_up_proj",), "down_proj")]
)
def test_transposed_and_stacked_layers_count_by_their_neurons(family, into, out):
    import transformers

    torch.manual_seed(0)
    sizes = (
        {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": 12, "n_positions": 16}
        if family == "GPT2"
        else {
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16,
            "pad_token_id": 0,
        }
    )
    config = getattr(transformers, f"{family}Config")(vocab_size=32, **sizes)
    model = getattr(transformers, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")(config)
    after = copy.deepcopy(model)
    mlp = (after.transformer.h if family == "GPT2" else after.model.layers)[0].mlp
    with torch.no_grad():
        weight = getattr(mlp, into[0]).weight
        # Neuron 4: a column of Conv1D; rows 4 and 4 + 12 of gate and up on top of each other.
        for view in (weight[:, 4],) if family == "GPT2" else (weight[4], weight[16]):
            view += 1.0
        weight = getattr(mlp, out).weight
        (weight[4] if family == "GPT2" else weight[:, 4]).add_(1.0)
    (energy,) = smearing(model, after).energy.values()
    expected = torch.zeros(12).double()
    expected[4] = 16 if family == "GPT2" else 24
    assert torch.allclose(energy, expected, atol=1e-4)


def test_hubs_drawn_at_random_lie_in_the_null_interval():
    from sparse_cl.probes.smearing import _hub_share

    generator = torch.Generator().manual_seed(0)
    energy = torch.randn(200, generator=generator).square().double()
    inside, shares = 0, []
    for _ in range(2000):
        found = _hub_share(energy, torch.randperm(200, generator=generator)[:20])
        inside += found.null_interval[0] <= found.share_of_energy <= found.null_interval[1]
        shares.append(found.share_of_energy)
    assert 0.935 <= inside / 2000 <= 0.965
    shares = torch.tensor(shares)
    assert shares.mean().item() == pytest.approx(0.1, abs=4 * shares.std().item() / 2000**0.5)
    half_width = (found.null_interval[1] - found.null_interval[0]) / 2
    assert half_width == pytest.approx(1.96 * shares.std().item(), rel=0.06)


def test_bad_input_is_refused_by_name(tiny_llama):
    after = copy.deepcopy(tiny_llama)
    for index, complaint in (
        ([24], r"expected indices in \[0, 24\), got 24 to 24"),
        ([-1], r"expected indices in \[0, 24\)"),
        ([3, 3], "expected distinct indices, got 2 of 1 neurons"),
    ):
        with pytest.raises(ValueError, match=complaint):
            smearing(tiny_llama, after, {"model.layers.0.mlp": index})
    with pytest.raises(ValueError, match=r"hubs: 'mlp' is no MLP of the model; there are model\.layers\.0\.mlp"):
        smearing(tiny_llama, after, {"mlp": [0]})
    weights = dict(tiny_llama.named_parameters())
    with pytest.raises(ValueError, match="at least one torch.nn.Module, got two mappings"):
        smearing(weights, weights)
    del weights["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"up_proj\.weight is only in the one after"):
        smearing(weights, after)
