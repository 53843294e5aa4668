"""Waking by its definition in float64, its null exactly, and the null's interval by how often chance lies in it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases.methods import copy_of, domain

from sparse_cl.models.neuron_masks import places
from sparse_cl.models.parts import find_mlps
from sparse_cl.probes import ActivationProbe, dormant, waking
from sparse_cl.probes.waking import _landed


def scores(model, *numbers):
    return {str(n): ActivationProbe(model).run(domain(n)) for n in numbers}


@pytest.fixture
def silent(tiny_llama):
    """A model of which neuron 5 of each MLP never fires."""
    with torch.no_grad():
        for layer in tiny_llama.model.layers:
            layer.mlp.gate_proj.weight[5] = 0
    return tiny_llama.double()


def trained(model):
    after = copy_of(model).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in after.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return after


def test_is_its_definition(silent):
    after = trained(silent)
    earlier, learned = scores(silent, 0, 3), ActivationProbe(after).run(domain(1))
    found = waking(silent, after, earlier, learned, taus=(0.0, 0.9), lowest=0.25)
    by_domain = dormant(earlier).scores.values()
    for one, chosen_of in (
        (found.dormant[0.0], lambda peak: [5]),
        (found.dormant[0.9], lambda peak: (peak <= 0.9).nonzero().flatten().tolist()),
        (found.lowest, lambda peak: peak.sort().indices[:6].tolist()),
    ):
        hit = {"update": 0.0, "activation": 0.0}
        total, expected, count = dict(hit), dict(hit), 0
        for mlp, other in zip(find_mlps(silent), find_mlps(after), strict=True):
            chosen = chosen_of(torch.stack([s[mlp.name] for s in by_domain]).amax(0))
            count += len(chosen)
            changes = [n.weight - o.weight for n, o in zip(other.into.values(), mlp.into.values(), strict=True)]
            changes.append((other.out.weight - mlp.out.weight).mT)
            amounts = {
                "update": sum(change.square().sum(1) for change in changes).detach(),
                "activation": learned.mean()[mlp.name],
            }
            for name, amount in amounts.items():
                hit[name] += float(amount[chosen].sum())
                total[name] += float(amount.sum())
                expected[name] += float(amount.mean()) * len(chosen)
        assert (one.neurons, one.width) == (count, 48)
        for name in hit:
            landed = getattr(one, name)
            assert landed.share == pytest.approx(hit[name] / total[name], rel=1e-9)
            assert landed.expected == pytest.approx(expected[name] / total[name], rel=1e-9)
            assert landed.null_interval[0] <= landed.expected <= landed.null_interval[1]
    assert len(places(find_mlps(silent)[0])) == 3


def test_what_lands_on_dormant_neurons_alone_is_all_of_it(silent):
    after = copy_of(silent).double()
    with torch.no_grad():
        for layer in after.model.layers:
            layer.mlp.gate_proj.weight[5] += 1
            layer.mlp.down_proj.weight[:, 5] -= 1
    found = waking(silent, after, scores(silent, 0), ActivationProbe(after).run(domain(1)), taus=(0.0,))
    assert found.dormant[0.0].update.share == 1.0
    assert found.dormant[0.0].update.null_interval[1] <= 1.0
    assert 0 < found.dormant[0.0].activation.share < 1
    record = found.to_json()
    assert record["dormant"][0.0]["neurons"] == 2 and record["lowest_share"] == 0.1


def test_expectation_and_interval_are_those_of_all_draws():
    amounts = {"a": torch.arange(1.0, 7.0).double(), "b": torch.tensor([1.0, 5.0]).double()}
    sets = {"a": torch.tensor([1, 1, 0, 0, 0, 0]).bool(), "b": torch.tensor([1, 0]).bool()}
    pairs = itertools.product(itertools.combinations(range(6), 2), range(2))
    every = [float(amounts["a"][list(pair)].sum() + amounts["b"][one]) / 27 for pair, one in pairs]
    found = _landed(amounts, sets, 0)
    assert found.share == pytest.approx(4 / 27)
    assert found.expected == pytest.approx(sum(every) / len(every))
    low, high = torch.tensor(every).double().quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    assert found.null_interval == pytest.approx((low, high), abs=1.01 / 27)


def test_random_sets_lie_in_the_interval_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    amounts = {str(n): torch.rand(60, generator=generator).double().square() for n in range(2)}
    inside, trials = 0, 120
    for seed in range(trials):
        sets = {n: torch.rand(60, generator=generator).argsort().argsort() < 6 for n in amounts}
        found = _landed(amounts, sets, seed)
        inside += found.null_interval[0] <= found.share <= found.null_interval[1]
    assert 0.89 <= inside / trials <= 0.99


def test_nothing_changed_and_nothing_dormant(silent):
    found = waking(silent, silent, scores(silent, 0), ActivationProbe(silent).run(domain(1)))
    assert math.isnan(found.lowest.update.share) and found.to_json()["lowest"]["update"]["share"] is None
    assert found.dormant[0.0].activation.share == 0.0
    none = waking(silent, trained(silent), scores(silent, 0, 1), ActivationProbe(silent).run(domain(1)), lowest=0.001)
    assert (none.lowest.neurons, none.lowest.update.share, none.lowest.update.null_interval) == (0, 0.0, (0.0, 0.0))


def test_what_cannot_be_used(silent):
    learned = ActivationProbe(silent).run(domain(1))
    with pytest.raises(ValueError, match="earlier: expected at least one domain, got none"):
        waking(silent, silent, {}, learned)
    with pytest.raises(ValueError, match=r"lowest: expected a share in \(0, 1\], got 0"):
        waking(silent, silent, scores(silent, 0), learned, lowest=0.0)
    with pytest.raises(ValueError, match="taus: expected thresholds of at least 0"):
        waking(silent, silent, scores(silent, 0), learned, taus=(-1.0,))
    watched = ActivationProbe(silent, modules={"act": silent.model.layers[0].mlp.act_fn}).run(domain(1))
    with pytest.raises(ValueError, match="expected one model, but model.layers.0.mlp has 24 neurons in 0 and none"):
        waking(silent, silent, scores(silent, 0), watched)
    with pytest.raises(ValueError, match="learned: act is a SiLU.*; watch the MLPs' neurons"):
        waking(silent, silent, watched, watched)
    with pytest.raises(ValueError, match="before: expected the weights of the neurons, model.layers.0.mlp.gate_proj"):
        waking({}, {}, scores(silent, 0), learned)
