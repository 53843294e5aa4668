"""Hubs and dormant neurons: planted ones are found, all of them and no others."""

import json
import warnings

import pytest
import torch
import transformers
from cases.activation import planted, scored
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.models.parts import find_mlps
from sparse_cl.probes.neurons import agreement, dormant, hubs, weight_hubs

CONFIGS = {
    "Llama": {"intermediate_size": 24, "num_key_value_heads": 2, "pad_token_id": 0},
    "Phi3": {"intermediate_size": 24, "num_key_value_heads": 2, "pad_token_id": 0},
    "GPTNeoX": {"intermediate_size": 24},
}


def generator(seed):
    return torch.Generator().manual_seed(seed)


@given(st.integers(2, 4), st.integers(0, 50))
def test_hubs_are_what_all_planted_sets_have_in_common(domains, seed):
    sets = [torch.randperm(30, generator=generator(seed + i))[:12].tolist() for i in range(domains)]
    scores = {str(i): scored(planted(generator(i), active, 30)) for i, active in enumerate(sets)}
    (layer,) = hubs(scores, 0.4).layers.values()
    common = set.intersection(*map(set, sets))
    assert layer.indices.tolist() == sorted(common)
    assert layer.interval == (len(common), len(common))
    assert (layer.size, layer.expected) == (12, pytest.approx(30 * 0.4**domains))
    # The lowest percentile over domains is high for hubs, and for them alone.
    assert {*(layer.usage >= 1 - 11 / 29 - 1e-9).nonzero().flatten().tolist()} == common


def test_hubs_of_random_activations_are_as_many_as_chance_leaves():
    inside, counts = 0, []
    for seed in range(100):
        values = torch.randn(3, 16, 2, 1, 100, generator=generator(seed))
        scores = {str(i): scored(one, 16) for i, one in enumerate(values)}
        (layer,) = hubs(scores, 0.3).layers.values()
        low, high = layer.null_interval
        inside += low <= len(layer.indices) <= high
        counts.append(len(layer.indices))
    assert inside >= 93
    assert sum(counts) / 100 == pytest.approx(layer.expected, abs=0.5)
    assert layer.expected == pytest.approx(2.7)


def make(family):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50, **CONFIGS[family]}
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**sizes)).eval()


@pytest.mark.parametrize("family", CONFIGS)
def test_hubs_by_weight_follow_the_formula_and_find_what_is_planted(family):
    model = make(family)
    found = weight_hubs(model, 3 / 24)
    for mlp in find_mlps(model):
        rows = [layer.weight.detach() for layer in mlp.into.values()]
        expected = []
        for i in range(24):
            into = sum(float(w[j].double().square().sum()) for w in rows for j in range(i, len(w), 24))
            expected.append((into * float(mlp.out.weight.detach()[:, i].double().square().sum())) ** 0.5)
        torch.testing.assert_close(found.norms[mlp.name], torch.tensor(expected, dtype=torch.float64))
    with torch.no_grad():
        mlp.out.weight[:, [2, 5, 20]] *= 50
    assert weight_hubs(model, 3 / 24).indices[mlp.name].tolist() == [2, 5, 20]


def test_agreement_is_full_for_neurons_that_large_weights_drive_and_chance_for_random_ones():
    class Mlp(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = torch.nn.Linear(8, 200, bias=False), torch.nn.Linear(200, 8)

    from sparse_cl.probes.activation import ActivationProbe

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = Mlp()

        def forward(self, x):
            return self.mlp.fc2(self.mlp.fc1(x))

    torch.manual_seed(0)
    model = Model()
    # The layer out is scaled too; rows in and columns out are of one length before.
    gain = 1.05 ** torch.randperm(200)
    with torch.no_grad():
        weight = torch.nn.functional.normalize(model.mlp.fc1.weight, dim=1)
        model.mlp.fc1.weight.copy_(weight * gain[:, None])
        model.mlp.fc2.weight.copy_(torch.nn.functional.normalize(model.mlp.fc2.weight, dim=0))
    scores = {name: ActivationProbe(model).run(torch.randn(4, 32, 100, 8).unbind()) for name in "ab"}
    by_usage = hubs(scores, 0.1)
    found = agreement(by_usage, weight_hubs(model, 0.1))["mlp"]
    assert found["iou"] > 0.7 and found["correlation"] > 0.95
    with torch.no_grad():
        model.mlp.fc2.weight.mul_(1 / gain * 1.05 ** torch.randperm(200))
    found = agreement(by_usage, weight_hubs(model, 0.1))["mlp"]
    low, high = found["null_interval"]
    assert low <= found["iou"] <= high and abs(found["correlation"]) < 0.2
    assert found["null"] == pytest.approx(20 / 380)
    json.dumps(found, allow_nan=False)
    with pytest.raises(ValueError, match="expected 200 neurons in mlp, got no such layer"):
        agreement(by_usage, weight_hubs(make("Llama")))


def test_dormant_neurons_are_found_and_none_is_invented():
    values = torch.rand(2, 32, 10, 2, 40, generator=generator(0)) + 0.5
    values[:, :, :, 0, [3, 9]] = 0.0  # dead in both domains
    values[0, :, :, 0, 17] = 0.0  # dead in one
    values[:, :, :, 1, 21] *= 0.01  # nearly dead
    values[1, :, :, 1, 30] *= 0.06
    found = dormant({name: scored(one) for name, one in zip("ab", values, strict=True)})
    expected = {
        (0.0, "a"): [[3, 9, 17], []],
        (0.0, "b"): [[3, 9], []],
        (0.0, None): [[3, 9], []],
        (0.025, "b"): [[3, 9], [21]],
        (0.1, "a"): [[3, 9, 17], [21]],
        (0.1, "b"): [[3, 9], [21, 30]],
        (0.1, None): [[3, 9], [21]],
    }
    for (tau, domain), neurons in expected.items():
        assert [n.tolist() for n in found.indices(tau, domain).values()] == neurons
        assert found.share(tau, domain) == sum(map(len, neurons)) / 80
    record = found.to_json()
    json.dumps(record, allow_nan=False)
    assert record["dormant"][2]["all domains"]["counts"] == [2, 1]
    assert record["dormant"][0]["domains"]["a"] == {"counts": [3, 0], "share": 3 / 80, "interval": [3 / 80, 3 / 80]}


@given(st.integers(1, 20), st.floats(0.01, 100))
def test_scores_have_a_mean_of_one_whatever_the_scale(width, scale):
    found = dormant(scored(scale * (torch.rand(4, 3, 1, width) + 0.01)))
    (scores,) = found.scores.values()
    assert scores["layer0"].mean().item() == pytest.approx(1)
    assert not len(found.indices(0.0)["layer0"])


def test_one_group_and_a_layer_without_activation():
    found = dormant(scored(torch.zeros(1, 3, 1, 5)))
    assert found.share(0.0) == 1
    assert found.to_json()["dormant"][0]["domains"]["all data"]["interval"] is None
    scores = {name: scored(torch.rand(1, 3, 1, 5)) for name in "ab"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = hubs(scores, 0.2).to_json()
    assert record["layers"][0]["interval"] is None
    json.dumps(record, allow_nan=False)


def test_bad_input_is_named():
    scores = scored(torch.rand(4, 3, 1, 5))
    with pytest.raises(ValueError, match="expected at least two domains, got one"):
        hubs({"one": scores})
    with pytest.raises(ValueError, match="which is 10 of a layer's 5 neurons"):
        hubs({"one": scores, "two": scores}, 2.0)
    with pytest.raises(ValueError, match="at least one domain, got none"):
        dormant({})
    with pytest.raises(ValueError, match=r"taus: expected thresholds of at least 0, got \[0.1, -1\]"):
        dormant(scores, [0.1, -1])
