"""Losses along the line between two checkpoints: against models of those weights, and a planted barrier."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparse_cl.models.losses import mean_loss
from sparse_cl.probes.connectivity import connectivity


class Sine(nn.Module):
    """Gives token 1 the logit sin²(πw) after a known weight, so that two zeros of it have a hill between them."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight], dtype=torch.float64))

    def forward(self, input_ids, attention_mask):
        loss = torch.sin(math.pi * self.weight).square()
        logits = torch.zeros(*input_ids.shape, 2, dtype=torch.float64)
        # −ln p of token 1 is exactly `loss + ln 2`.
        other = torch.log(torch.exp(loss + math.log(2)) - 1)
        return SimpleNamespace(logits=torch.stack([logits[..., 0] + other, logits[..., 1]], -1))


def ones(sequences=3, length=5):
    ids = torch.ones(sequences, length, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def test_a_planted_barrier_has_its_height_and_place():
    result = connectivity(Sine(0.0), Sine(1.0), {"hill": [ones()]}, points=5)
    path = result.domains["hill"]
    assert result.points == (0.0, 0.25, 0.5, 0.75, 1.0)
    expected = [math.log(2) + math.sin(math.pi * t) ** 2 for t in result.points]
    assert path.losses == pytest.approx(expected, rel=1e-9)
    assert (path.barrier, path.barrier_at) == (pytest.approx(1, rel=1e-9), 0.5)
    assert path.barrier_halves == pytest.approx((1, 1))
    assert path.tokens == 12


def test_a_slope_without_a_hill_has_no_barrier():
    result = connectivity(Sine(0.5), Sine(1.0), {"down": [ones()]}, points=3).domains["down"]
    # The loss falls by sin²: at the middle it is on the straight line.
    assert result.barrier == pytest.approx(0, abs=1e-9)
    assert result.rise == pytest.approx(-1, rel=1e-9)
    bowl = connectivity(Sine(0.6), Sine(1.4), {"bowl": [ones()]}, points=3).domains["bowl"]
    assert (bowl.barrier, bowl.barrier_at) == (0.0, None)


@pytest.fixture
def checkpoints(tiny_llama):
    after = copy.deepcopy(tiny_llama)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return tiny_llama, after


def records(sequences, seed=0, length=10):
    ids = torch.randint(1, 200, (sequences, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :4] = -100
    mask = torch.ones_like(ids)
    mask[0, 7:], labels[0, 7:] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_each_point_is_the_loss_of_a_model_with_those_weights_and_no_model_is_changed(checkpoints):
    before, after = checkpoints
    assert before.lm_head.weight is before.model.embed_tokens.weight, "tied, which must stay so"
    batches = {"a": [records(4), records(3, seed=1)], "b": [records(2, seed=2)]}
    kept = [copy.deepcopy(m.state_dict()) for m in checkpoints]
    places = [[p.data_ptr() for p in m.parameters()] for m in checkpoints]
    after.train()
    result = connectivity(before, after, batches, points=4)
    assert after.training
    assert not before.training
    for model, state, place in zip(checkpoints, kept, places, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert [p.data_ptr() for p in model.parameters()] == place
    assert before.lm_head.weight is before.model.embed_tokens.weight
    for t, *losses in zip(result.points, *(result.domains[d].losses for d in "ab"), strict=True):
        between = copy.deepcopy(before)
        with torch.no_grad():
            for p, x, y in zip(between.parameters(), before.parameters(), after.parameters(), strict=True):
                p.copy_(((1 - t) * x.double() + t * y.double()).float())
        for domain, loss in zip("ab", losses, strict=True):
            assert loss == pytest.approx(mean_loss(between, batches[domain]), rel=1e-5)
    path = result.domains["a"]
    # Sequences are counted through the batches: 0, 2 of the first and 4, 6 (its 0, 2) of the second are even.
    for half in (0, 1):
        part = [
            {key: value[half::2] for key, value in batches["a"][0].items()},
            {key: value[half::2] for key, value in batches["a"][1].items()},
        ]
        assert path.rise_halves[half] == pytest.approx(mean_loss(after, part) - mean_loss(before, part), abs=1e-5)
    assert path.rise == pytest.approx(path.losses[-1] - path.losses[0])
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["domains"]["b"]["tokens"] == 2 * 6 - 3


def test_half_precision_weights_are_between_in_float32_and_the_ends_are_exact(checkpoints):
    before, after = checkpoints = [m.bfloat16() for m in checkpoints]
    path = connectivity(before, after, {"a": [records(4)]}, points=2).domains["a"]
    assert path.losses == pytest.approx([mean_loss(model, [records(4)]) for model in checkpoints], rel=1e-6)


def test_a_model_is_on_one_point_with_itself(tiny_llama):
    path = connectivity(tiny_llama, copy.deepcopy(tiny_llama), {"a": [records(4)]}).domains["a"]
    assert len(set(path.losses)) == 1
    assert (path.barrier, path.barrier_at, path.rise) == (0.0, None, 0.0)


def test_one_sequence_has_no_interval(checkpoints):
    path = connectivity(*checkpoints, {"a": [{k: v[1:2] for k, v in records(2).items()}]}).domains["a"]
    assert (path.barrier_halves, path.rise_halves) == (None, None)


def test_bad_input_is_refused_and_leaves_the_model_as_it_was(checkpoints):
    before, after = checkpoints
    kept = copy.deepcopy(before.state_dict())
    with pytest.raises(ValueError, match="points: expected at least 2, the two ends, got 1"):
        connectivity(before, after, {"a": [records(2)]}, points=1)
    with pytest.raises(ValueError, match="at least one domain, got none"):
        connectivity(before, after, {})
    with pytest.raises(ValueError, match="those of a can be read only once; give a list"):
        connectivity(before, after, {"a": iter([records(2)])})
    with pytest.raises(ValueError, match="batches of a: expected at least one answer token"):
        connectivity(before, after, {"a": []})
    unanswered = records(2) | {"labels": torch.full((2, 10), -100)}
    with pytest.raises(ValueError, match="batches of b: expected at least one answer token"):
        connectivity(before, after, {"a": [records(2)], "b": [unanswered]})
    with pytest.raises(IndexError):
        connectivity(before, after, {"a": [records(2) | {"input_ids": torch.full((2, 10), 10**6)}]})
    with pytest.raises(ValueError, match="only in the one before"):
        connectivity(before, nn.Linear(2, 2), {"a": [records(2)]})
    assert all(torch.equal(value, kept[name]) for name, value in before.state_dict().items())
    assert not before.training
