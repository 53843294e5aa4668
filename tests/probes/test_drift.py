"""Drift of hidden states against all of them stored, planted movements, and bad input."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from cases.cka import cka_of_kernels, gaussian
from torch import nn

from sparse_cl.probes.drift import drift


def linear(matrix, bias):
    model = nn.Sequential(nn.Linear(*matrix.shape).double())
    model[0].weight.data, model[0].bias.data = matrix.mT.clone(), bias.clone()
    return model


def batches_of(rows, length=5, count=6):
    return list(rows.view(-1, length, rows.shape[-1]).split(count))


SCALES = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.5], dtype=torch.float64)


def planted(seed=0):
    """A layer with principal axes U and standard deviations SCALES, and its inputs of unit covariance."""
    rows = gaussian(4000, 6, seed=seed)
    rows = rows - rows.mean(0)
    # Whitened, so that what was planted is there exactly.
    rows = torch.linalg.solve_triangular(
        torch.linalg.cholesky(torch.cov(rows.mT, correction=0)), rows.mT, upper=False
    ).mT
    axes = torch.linalg.qr(gaussian(6, 6, seed=seed + 1)).Q
    return rows, axes


def test_every_number_is_that_of_the_stored_features():
    before = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 8)).double()
    after = copy.deepcopy(before)
    for parameter in after.parameters():
        parameter.data += 0.2 * gaussian(*parameter.shape)
    batches = [gaussian(5, 4, 7, seed=seed) for seed in range(5)]
    result = drift(before, after, batches, modules=["1", "2"], rank=3)
    with torch.no_grad():
        for name, depth in (("1", 2), ("2", 3)):
            x, y = (torch.cat([m[:depth](b) for b in batches]) for m in (before, after))
            parts = [
                (x.flatten(0, 1), y.flatten(0, 1)),
                *((x[i::2].flatten(0, 1), y[i::2].flatten(0, 1)) for i in (0, 1)),
            ]
            layer = result.layers[name]
            reference = parts[0][0]
            _, sigma, axes = torch.linalg.svd(reference - reference.mean(0), full_matrices=False)
            for (a, b), measured in zip(parts, (layer.all, *layer.halves), strict=True):
                assert measured.cka == pytest.approx(cka_of_kernels(a, b), rel=1e-9)
                spans = [torch.linalg.svd(v - v.mean(0), full_matrices=False).Vh[:3] for v in (a, b)]
                assert measured.overlap == pytest.approx((spans[0] @ spans[1].mT).norm().item() ** 2 / 3, rel=1e-7)
                moved = axes[:3] @ (b.mean(0) - a.mean(0)) / (sigma[:3] / len(reference) ** 0.5)
                assert measured.displacement == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-8)
                variance = (a - a.mean(0)).square().sum().item()
                assert measured.change == pytest.approx((b - a).square().sum().item() / variance, rel=1e-9)
            halves = [torch.linalg.svd(v - v.mean(0), full_matrices=False).Vh[:3] for v, _ in parts[1:]]
            assert layer.ceiling_overlap == pytest.approx((halves[0] @ halves[1].mT).norm().item() ** 2 / 3, rel=1e-7)
            assert (layer.tokens, layer.width, layer.rank) == (100, x.shape[-1], 3)
            assert layer.null_overlap == 3 / x.shape[-1]


def test_a_turn_by_a_known_angle_and_a_push_of_known_length_are_found():
    rows, axes = planted()
    angle = math.pi / 6
    turn = torch.eye(6, dtype=torch.float64)
    # The second axis is turned towards the third: of the two leading ones, one stays and one moves by the angle.
    turn[1, 1] = turn[2, 2] = math.cos(angle)
    turn[1, 2], turn[2, 1] = math.sin(angle), -math.sin(angle)
    push = torch.tensor([2 * 8.0, -1 * 4.0, 0, 0, 0, 0], dtype=torch.float64)
    before = linear(SCALES.diag() @ axes.mT, torch.zeros(6).double())
    after = linear(SCALES.diag() @ turn @ axes.mT, push @ axes.mT)
    layer = drift(before, after, batches_of(rows), modules=["0"], rank=2).layers["0"]
    assert torch.allclose(layer.cosines, torch.tensor([1.0, math.cos(angle)]).double(), atol=1e-9)
    assert layer.all.overlap == pytest.approx((1 + math.cos(angle) ** 2) / 2, rel=1e-9)
    assert torch.allclose(layer.displacements.abs(), torch.tensor([2.0, 1.0]).double(), atol=1e-9)
    assert layer.all.displacement == pytest.approx(math.sqrt(5 / 2), rel=1e-9)
    assert layer.all.cka == pytest.approx(1, abs=1e-9), "a rotation about the mean is no change of similarity"
    moved = (turn - torch.eye(6)).double()
    expected = ((SCALES.diag() @ moved).square().sum() + push.square().sum()) / SCALES.square().sum()
    assert layer.all.change == pytest.approx(expected.item(), rel=1e-9)
    assert layer.ceiling_overlap > 0.999


def test_unrelated_features_have_no_similarity_and_the_overlap_of_the_null():
    wide = gaussian(2000, 32, seed=5)
    ckas, overlaps = [], []
    for seed in range(20):
        # Two disjoint halves of the inputs, each turned at random: what one layer sees, the other does not.
        first, second = (torch.zeros(32, 32, dtype=torch.float64) for _ in range(2))
        first[:16], second[16:] = gaussian(16, 32, seed=seed), gaussian(16, 32, seed=100 + seed)
        models = [linear(m, torch.zeros(32).double()) for m in (first, second)]
        layer = drift(*models, batches_of(wide, count=100), modules=["0"], rank=4).layers["0"]
        ckas.append(layer.all.cka)
        overlaps.append(layer.all.overlap)
    assert max(map(abs, ckas)) < 0.02
    overlaps = torch.tensor(overlaps)
    assert abs(overlaps.mean().item() - 4 / 32) < 3 * overlaps.std().item() / 20**0.5


@pytest.mark.parametrize("same_object", [True, False])
def test_the_same_model_has_not_drifted_at_all(tiny_llama, same_object):
    after = tiny_llama if same_object else copy.deepcopy(tiny_llama)
    ids = torch.randint(1, 200, (4, 12), generator=torch.Generator().manual_seed(0))
    result = drift(tiny_llama, after, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    assert list(result.layers) == ["model.layers.0", "model.layers.1"]
    for layer in result.layers.values():
        for measured in (layer.all, *layer.halves):
            assert (measured.cka, measured.overlap, measured.displacement, measured.change) == (1.0, 1.0, 0.0, 0.0)
        assert layer.tokens == 44
        assert (layer.cosines == 1).all()
    assert result.before == result.before
    assert result.before.to_json() == result.after.to_json()


def test_a_language_model_is_compared_on_its_attended_text_in_any_batches(tiny_llama):
    after = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        after.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    ids = torch.randint(1, 200, (6, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2:4, 7:] = 0
    modes = [m.training for m in after.train().modules()]
    whole = drift(tiny_llama, after, [{"input_ids": ids, "attention_mask": mask, "labels": ids}])
    split = drift(
        tiny_llama,
        after,
        [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(2), mask.split(2), strict=True)],
    )
    assert [m.training for m in after.modules()] == modes
    assert not any(module._forward_hooks for model in (tiny_llama, after) for module in model.modules())
    assert whole.layers["model.layers.0"].all.cka == 1.0, "only the second block was changed"
    layer = whole.layers["model.layers.1"]
    assert layer.tokens == int(mask.sum()) - 6
    assert layer.rank == 1
    with torch.no_grad():
        # Before the final norm, which hidden_states[-1] is not.
        stored = []
        for model in (tiny_llama, after):
            model.model.layers[1].register_forward_hook(lambda _, __, out: stored.append(out))
            model.eval()(ids, attention_mask=mask)
            model.model.layers[1]._forward_hooks.clear()
    keep = mask.bool()
    keep[:, 0] = False
    x, y = (state[keep].double() for state in stored)
    assert layer.all.cka == pytest.approx(cka_of_kernels(x, y), rel=1e-4)
    for key, value in split.layers["model.layers.1"].to_json().items():
        if isinstance(value, float):
            assert value == pytest.approx(layer.to_json()[key], rel=1e-4)
    facts = json.loads(json.dumps(whole.to_json(), allow_nan=False))
    assert facts["layers"]["model.layers.1"]["halves"][0]["cka"] == layer.halves[0].cka
    assert {"model.layers.1.cosines", "before.model.layers.0.spectrum"} <= set(whole.tensors())


def test_the_ranks_beside_a_drift_are_those_of_the_features_alone():
    from sparse_cl.probes.features import FeatureProbe

    before, after = (nn.Sequential(nn.Linear(4, 5)).double() for _ in range(2))
    batches = [gaussian(6, 3, 4, seed=seed) for seed in range(3)]
    result = drift(before, after, batches, modules=["0"])
    for model, found in ((before, result.before), (after, result.after)):
        alone = FeatureProbe(model, {"0": model[0]}).run(batches)
        for key, value in alone.layers["0"].__dict__.items():
            assert getattr(found.layers["0"], key) == pytest.approx(value, rel=1e-9)


def test_features_that_do_not_vary_have_no_similarity_and_no_relative_change():
    before, after = (nn.Sequential(nn.Linear(3, 4)).double() for _ in range(2))
    before[0].weight.data.zero_()
    layer = drift(before, after, [gaussian(8, 30, 3)], modules=["0"]).layers["0"]
    assert layer.all.cka is None
    assert layer.all.change is None
    assert layer.all.displacement == 0.0
    json.dumps(layer.to_json(), allow_nan=False)


def test_checkpoints_that_cannot_be_compared_are_refused(tiny_llama):
    ids = torch.ones(2, 8, dtype=torch.int64)
    config = copy.deepcopy(tiny_llama.config)
    config.intermediate_size = 20
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.gate_proj\.weight is \(24, 16\) before and \(20, 16\) after"
    ):
        drift(tiny_llama, type(tiny_llama)(config), [ids])
    config.intermediate_size, config.num_hidden_layers = 24, 1
    with pytest.raises(ValueError, match=r"model\.layers\.1\.\S+ is only in the one before"):
        drift(tiny_llama, type(tiny_llama)(config), [ids])
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="share 0, so both are one model"):
        drift(model, nn.Sequential(model[0]), [torch.ones(9, 3)], modules=["0"])
    with pytest.raises(ValueError, match="modules: Sequential has no module '7'"):
        drift(model, copy.deepcopy(model), [torch.ones(9, 3)], modules=["7"])
    with pytest.raises(ValueError, match="rank: expected 1 to 4, the width of 0, got 5"):
        drift(model, copy.deepcopy(model), [torch.randn(9, 3)], modules=["0"], rank=5)
    with pytest.raises(ValueError, match="at least 4 tokens, got 3"):
        drift(model, copy.deepcopy(model), [torch.randn(3, 3)], modules=["0"])
    with pytest.raises(ValueError, match="got no batch"):
        drift(model, copy.deepcopy(model), [], modules=["0"])
    broken = copy.deepcopy(model)
    broken[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite in 0 after, batch 1"):
        drift(model, broken, [torch.randn(9, 3)], modules=["0"])


def test_too_little_text_is_warned_of():
    before = nn.Sequential(nn.Linear(6, 6)).double()
    after = nn.Sequential(nn.Linear(6, 6)).double()
    with pytest.warns(UserWarning, match=r"on 12 tokens the CKA of the two halves .* differs by \d\.\d\d in 0"):
        drift(before, after, [gaussian(12, 1, 6)], modules=["0"])
    with pytest.warns(UserWarning, match="12 tokens of too few sequences for an interval"):
        layer = drift(before, after, [gaussian(1, 12, 6)], modules=["0"]).layers["0"]
    assert layer.halves is None
    assert layer.ceiling_overlap is None
