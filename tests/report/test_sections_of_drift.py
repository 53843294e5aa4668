"""The sentences on drift, smearing, losses, rank and plasticity are true where the conjecture holds and where not."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from sparse_cl.probes.connectivity import Connectivity, DomainPath
from sparse_cl.probes.drift import drift as probe_drift
from sparse_cl.probes.plasticity import Fit, Plasticity, PlasticityChange
from sparse_cl.probes.rank import update_rank
from sparse_cl.probes.smearing import HubShare, Smearing, Spread
from sparse_cl.report.sections import connectivity, drift, plasticity, rank, smearing


def as_read(record):
    """As results.json gives it back."""
    return json.loads(json.dumps(record, allow_nan=False))


@pytest.fixture
def drifted():
    """before -> the record of a drift: a model turned about its mean, one that is another, and itself."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(40, 5, 16, generator=generator) for _ in range(3)]
    before = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    turned, other = copy.deepcopy(before), copy.deepcopy(before)
    with torch.no_grad():
        q = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
        turned[2].weight.copy_(q @ turned[2].weight)
        turned[2].bias.copy_(q @ turned[2].bias)
        for parameter in other.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def record(name):
        after = {"turned": turned, "other": other, "same": before}[name]
        return as_read(probe_drift(before, after, batches, modules=["0", "2"], rank=2).to_json())

    return record


def test_drift_says_that_there_is_none(drifted):
    found = drift.section(drifted("same"))
    assert found.sentence == (
        "On 600 tokens of the reference text no hidden state changed in any bit: there is no drift in any of the 2 "
        "layers."
    )
    assert found.table.rows[0][:3] == ("0", "1.000", "1.000 to 1.000")


def test_drift_says_where_it_is_greatest_and_what_chance_and_ceiling_are(drifted):
    record = drifted("other")
    found = drift.section(record)
    most = min(record["layers"], key=lambda name: record["layers"][name]["cka"])
    layer = record["layers"][most]
    mean = sum(1 - x["cka"] for x in record["layers"].values()) / 2
    assert f"1 − CKA of the hidden states before and after is {mean:.3f} on average over 2 layers" in found.sentence
    assert f"most in {most}, {1 - layer['cka']:.3f}" in found.sentence
    low, high = sorted(1 - half["cka"] for half in layer["halves"])
    assert f"the halves of the text give {low:.3f} to {high:.3f}" in found.sentence
    assert "keep" in found.sentence
    assert "(chance 0.125; two halves of the text agree to" in found.sentence
    assert "estimation explains" not in found.sentence


def test_drift_tells_a_rotation_from_a_change_and_an_overlap_above_its_ceiling(drifted):
    record = drifted("turned")
    assert "1 − CKA of the hidden states before and after is 0.000 on average" in drift.section(record).sentence
    for layer in record["layers"].values():
        layer["overlap"], layer["ceiling_overlap"] = 0.99, 0.95
    assert "no less than estimation explains" in drift.section(record).sentence


def test_drift_does_without_what_is_not_known(drifted):
    record = drifted("other")
    for layer in record["layers"].values():
        layer |= {"cka": None, "halves": None, "ceiling_overlap": None, "change": None}
    found = drift.section(record)
    assert "CKA is not defined in any layer" in found.sentence
    assert "two halves" not in found.sentence
    assert found.table.rows[0][1:3] == ("–", "–")


def test_rank_says_in_how_many_layers_it_fell_or_rose(drifted):
    record = drifted("other")
    before, after = (record[when]["layers"] for when in ("before", "after"))
    for name in before:
        before[name] |= {"effective_rank": 10.0, "effective_rank_halves": [9.0, 11.0], "gaussian_effective_rank": 20.0}
    for name, value, halves in (("0", 5.0, [4.0, 6.0]), ("2", 12.0, [10.5, 13.5])):
        after[name] |= {"effective_rank": value, "effective_rank_halves": halves, "gaussian_effective_rank": 20.0}
    found = rank.section({"before": record["before"], "after": record["after"]})
    assert found.sentence == (
        "The effective rank of the hidden states is 10 (before, 50% of random features'), 8 (after, 42% of random "
        "features') of 16 dimensions, mean over layers; after training it is lower in 1 and higher in 1 of 2 layers, "
        "in 1 of them by more than the two halves of the text differ."
    )
    one = rank.section({"code": record["before"]}).sentence
    assert one.endswith("is 10 (code, 50% of random features') of 16 dimensions, mean over layers.")


def test_rank_says_how_far_updates_are_from_random_ones(drifted):
    features = {"before": drifted("same")["before"]}
    w = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    low = torch.outer(torch.ones(20), torch.ones(10))
    updates = update_rank({"a.weight": w, "b.weight": w}, {"a.weight": w + low, "b.weight": w})
    found = rank.section(features, as_read(updates.to_json()))
    null = updates.weights["a.weight"]
    assert "1 of 2 weight matrices changed, by 1 of their norm on average" in found.sentence
    shares = (1 / null.gaussian_effective_rank, 1 / null.gaussian_stable_rank)
    assert f"{shares[0]:.0%} of the effective rank and {shares[1]:.0%} of the stable rank" in found.sentence
    none = rank.section(features, as_read(update_rank({"a": w}, {"a": w}).to_json()))
    assert none.sentence.endswith("None of the 1 weight matrices changed.")


def smeared(*shares, hubs=()):
    mlps = {f"layers.{i}.mlp": Spread(10, 1.0 if s else 0.0, 0.1, s) for i, s in enumerate(shares)}
    layers = {f"{name}.up_proj": spread for name, spread in mlps.items()}
    return as_read(Smearing(layers, mlps, {f"layers.{i}.mlp": hub for i, hub in enumerate(hubs)}, {}).to_json())


def test_smearing_tells_concentrated_from_smeared_and_from_nothing():
    assert smearing.section(smeared(0.88, 0.86)).sentence == (
        "90 % of the update's energy lies in 87.0% of an MLP's neurons on average (86.0% in layers.1.mlp to 88.0% in "
        "layers.0.mlp; 90 % if it were spread evenly): it is smeared over most of the neurons."
    )
    few = smearing.section(smeared(0.1, None, 0.2)).sentence
    assert "lies in 15.0% of an MLP's neurons" in few
    assert few.endswith("1 of 3 MLPs did not change: it is concentrated on few of the neurons.")
    assert smearing.section(smeared(None)).sentence == "None of the 1 MLPs changed."


def test_smearing_holds_hubs_against_as_many_random_neurons():
    above, below = HubShare(2, 0.2, 0.5, (0.1, 0.3)), HubShare(2, 0.2, 0.04, (0.1, 0.3))
    within, still, empty = (
        HubShare(2, 0.2, 0.21, (0.1, 0.3)),
        HubShare(2, 0.2, None, None),
        HubShare(0, 0.0, 0.0, (0.0, 0.0)),
    )
    found = smearing.section(smeared(0.9, 0.9, 0.9, None, 0.9, hubs=(above, below, within, still, empty))).sentence
    assert found.endswith(
        "The hubs, 20.0% of the neurons, get 25.0% of the energy (1.25 times their share): more than chance in 1 of 3 "
        "MLPs, less in 1, within it in 1."
    )
    assert smearing.section(smeared(None, hubs=(still,))).sentence.endswith("No MLP with hubs changed.")
    assert "hubs" not in smearing.section(smeared(0.9, hubs=(empty,))).sentence


def path(losses, barrier, at):
    return DomainPath(losses, 100, barrier, at, (0.9 * barrier, 1.1 * barrier), losses[-1] - losses[0], (0.1, 0.2))


def test_losses_say_which_domains_lost_and_whether_a_barrier_is_between():
    flat = Connectivity(
        (0.0, 0.5, 1.0), {"code": path((2.0, 1.5, 1.2), 0.0, None), "math": path((1.0, 1.2, 1.5), 0.0, None)}
    )
    assert connectivity.section(as_read(flat.to_json())).sentence == (
        "The loss after is higher than before on math, 1 of 2 (code 2.000 → 1.200, math 1.000 → 1.500); at the 3 "
        "points of the line between there is no barrier for any domain."
    )
    hill = Connectivity(
        (0.0, 0.5, 1.0), {"code": path((2.0, 3.0, 1.2), 1.4, 0.5), "math": path((1.0, 1.1, 0.9), 0.15, 0.5)}
    )
    found = connectivity.section(as_read(hill.to_json())).sentence
    assert found.startswith("The loss after is higher than before on no domain of 2 (")
    assert found.endswith(
        "on the line between there is a barrier for code, math, 2 of 2, the highest 1.400 nats for code at t = 0.5; "
        "the halves give 1.260 to 1.540."
    )


def fitted(*steps, loss):
    return Plasticity(tuple(Fit(i, s, (9.0, loss), loss) for i, s in enumerate(steps)), 0.5, 100, 20, 1e-4)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((10, 12, 11), (14, 15, 13), "more steps in 3 tasks, fewer in 0, the same in 0, so plasticity was lost"),
        ((10, 12, 11), (9, 8, 10), "more steps in 0 tasks, fewer in 3, the same in 0, so plasticity was gained"),
        ((10, 12, 11), (11, 12, 10), "more steps in 1 tasks, fewer in 1, the same in 1, so no clear change"),
        ((10, 12), (None, None), "more steps in 2 tasks, fewer in 0, the same in 0, so plasticity was lost"),
        ((None,), (None,), "more steps in 0 tasks, fewer in 0, the same in 1, so no clear change"),
    ],
)
def test_plasticity_counts_tasks_and_claims_no_more(before, after, expected):
    change = PlasticityChange(fitted(*before, loss=1.0), fitted(*after, loss=2.0))
    found = plasticity.section(as_read(change.to_json()))
    assert expected in found.sentence
    assert "median loss is 1.000 before and 2.000 after" in found.sentence
    if after == (None, None):
        assert "more than 100 steps (more than 100) after" in found.sentence
        assert found.table.rows[0] == ("0", "10", "> 100", "–", "1.000", "2.000")
    if before == (10, 12, 11):
        assert "needs 11 steps (10 to 12) before" in found.sentence
