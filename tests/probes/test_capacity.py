"""Capacity on inputs whose directions are known, and against the oracle that keeps every input."""

import math

import pytest
import torch
from cases.subspace import Oracle, orthogonal
from torch import nn

from sparse_cl.probes.capacity import capacity, forecast, forecast_of_model
from sparse_cl.probes.inputs import InputProbe


def draw(directions, count, seed):
    """(count, 1, n) float64 inputs with unit variance along the columns of `directions`."""
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(count, 1, directions.shape[1], generator=rng, dtype=torch.float64) @ directions.mT).contiguous()


def probe(layer, inputs):
    return InputProbe(layer, {"it": layer}).run(inputs.split(16))


@pytest.fixture
def layer():
    return nn.Linear(24, 8, dtype=torch.float64)


def test_planted_directions_are_counted_exactly(layer):
    q = orthogonal(24)
    seen = {"a": draw(q[:, :5], 200, 0), "b": draw(q[:, 3:10], 200, 1), "again": draw(q[:, :5], 200, 2)}
    result = capacity({name: probe(layer, x) for name, x in seen.items()}, energy=1.0)
    of = result.layers["it"]
    assert of.width == 24 and of.alone == [5, 7, 5] and of.alone_halves == [(5, 5), (7, 7), (5, 5)]
    assert of.used == [5, 10, 10] and of.free == 14 and of.repeated == [0, 0, 0]
    assert of.used_null == [5, 12, 17], "random directions share none in so wide a space"
    assert result.tokens == dict.fromkeys(seen, 200)


@pytest.mark.parametrize("energy", [0.8, 0.95])
def test_it_is_what_keeping_every_input_gives(layer, energy):
    scales = 0.8 ** torch.arange(24, dtype=torch.float64)
    seen = {name: draw(orthogonal(24, i) * scales, 300, i) for i, name in enumerate("abc")}
    result = capacity({name: probe(layer, x) for name, x in seen.items()}, energy=energy).layers["it"]
    together, used = Oracle(24, energy), []
    for i, x in enumerate(seen.values()):
        rows = x.flatten(0, 1)
        alone, first = Oracle(24, energy), Oracle(24, energy)
        assert result.alone[i] == alone.learn([rows])
        assert result.alone_halves[i][0] == first.learn([rows[::2]])
        assert result.repeated[i] == first.further([rows[1::2]])
        used.append(sum(used[-1:]) + together.learn([rows]))
    assert result.used == used


def test_what_survives_of_a_gradient_is_its_energy_outside_earlier_domains(layer):
    q = orthogonal(24)
    moments = {"a": probe(layer, draw(q[:, :4], 100, 0)), "b": probe(layer, draw(q[:, 4:6], 100, 1))}
    gradient = torch.zeros(8, 24, dtype=torch.float64)
    gradient[0], gradient[1] = 3 * q[:, 0], 4 * q[:, 20]
    given = {"a": {"it": gradient}, "b": {"it": gradient}}
    of = capacity(moments, energy=1.0, gradients=given).layers["it"]
    assert of.surviving == pytest.approx([1.0, 16 / 25], abs=1e-12)
    assert of.left() == pytest.approx(18 / 24 * 16 / 25, abs=1e-12)


def test_the_null_of_a_spectrum_is_its_own_in_random_directions(layer):
    """Domains whose directions are random to each other take as many as the null says, up to its chance."""
    scales = 0.7 ** torch.arange(24, dtype=torch.float64)
    gaps = []
    for seed in range(20):
        seen = [draw(orthogonal(24, 100 * seed + i) * scales, 400, i) for i in range(3)]
        of = capacity({str(i): probe(layer, x) for i, x in enumerate(seen)}, energy=0.9, seed=seed).layers["it"]
        gaps.append(of.used[-1] - of.used_null[-1])
    assert abs(sum(gaps) / len(gaps)) < 0.5 and max(map(abs, gaps)) <= 2


def test_neurons_in_use_are_the_fewest_with_the_mass(layer):
    moments = {name: probe(layer, draw(orthogonal(24), 50, 0)) for name in "ab"}
    means = {"a": {"mlp": torch.tensor([4.0, 3, 2, 1, 0])}, "b": {"mlp": torch.tensor([0.0, 0, 0, 9, 1])}}
    result = capacity(moments, activations=means, mass=0.9).to_json()
    assert result["neurons"] == {"mlp": {"neurons": 5, "alone": [3, 1], "used": [3, 4], "free": 1}}


def test_a_forecast_divides_what_is_free_by_what_domains_take():
    assert forecast([10, 14, 16], 24) == {"low": 2.0, "expected": 4.0, "high": 4.0}
    assert forecast([10, 12, 12], 24) == {"low": 6.0, "expected": None, "high": None}
    assert forecast([6], 24) == {"low": 3.0, "expected": 3.0, "high": 3.0}
    layers = [{"low": 1.0, "expected": 2.0, "high": None}, {"low": 3.0, "expected": None, "high": None}]
    assert forecast_of_model([*layers, layers[0]]) == {"low": 1.0, "expected": 2.0, "high": None, "first": 2.0}
    assert forecast_of_model([layers[1]])["first"] is None


def test_in_a_transformer_each_distinct_input_is_seen_once_and_covers_all_layers(tiny_llama):
    ids = torch.arange(40).view(4, 10)
    seen = InputProbe(tiny_llama, tokens="all").run([{"input_ids": ids}])
    assert len(seen.halves) == 8 and seen.tokens == 40
    assert sum(len(layers) for layers in seen.layers.values()) == 14
    stored = {}
    for name in seen.halves:
        tiny_llama.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: stored.update({name: inputs[0]})
        )
    tiny_llama(ids)
    for name, (even, odd) in seen.halves.items():
        for moment, rows in ((even, stored[name][::2]), (odd, stored[name][1::2])):
            flat = rows.detach().flatten(0, 1).double()
            torch.testing.assert_close(moment.moment.double(), flat.mT @ flat, rtol=1e-5, atol=1e-6)


def test_all_of_it_is_json(layer):
    import json

    q = orthogonal(24)
    moments = {"a": probe(layer, draw(q[:, :5], 60, 0)), "b": probe(layer, draw(q[:, 3:10], 60, 1))}
    record = json.loads(json.dumps(capacity(moments, energy=1.0).to_json(), allow_nan=False))
    assert record["layers"]["it"]["forecast"]["expected"] == pytest.approx(14 / 5)
    assert record["forecast"]["first"] == pytest.approx(14 / 5) and not math.isnan(record["forecast"]["low"])


def test_bad_input_says_what_is_wrong(layer):
    other = nn.Linear(5, 2, dtype=torch.float64)
    here = probe(layer, draw(orthogonal(24), 20, 0))
    there = probe(other, draw(orthogonal(5), 20, 0))
    with pytest.raises(ValueError, match="moments: expected one model, but it has 24 inputs in a and 5 in b"):
        capacity({"a": here, "b": there})
    with pytest.raises(ValueError, match="moments: expected at least one domain"):
        capacity({})
    with pytest.raises(ValueError, match=r"energy: expected a share in \(0, 1\], got 1.5"):
        capacity({"a": here}, energy=1.5)
    with pytest.raises(ValueError, match="modules: expected at least one"):
        InputProbe(layer, {})
