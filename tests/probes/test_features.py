"""Ranks of hidden states against the whole matrix of them, and planted spectra."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_cl.models.passes import stream
from sparse_cl.probes.features import FeatureProbe, Moment
from sparse_cl.probes.rank import effective_rank, stable_rank


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5))
def test_moments_are_those_of_all_rows_however_they_come(count, width, pieces):
    rows = 3 * gaussian(count, width) + 100
    moment = Moment.about(rows[:1])
    for piece in rows.tensor_split(pieces):
        moment.add(piece)
    assert torch.allclose(moment.mean(), rows.mean(0), rtol=1e-12)
    assert torch.allclose(moment.covariance(), torch.cov(rows.mT, correction=0).view(width, width), atol=1e-9)
    assert torch.allclose(moment.second_moment(), rows.mT @ rows / count, rtol=1e-10)
    parts = [moment.empty() for _ in range(2)]
    for half, part in zip((rows[::2], rows[1::2]), parts, strict=True):
        part.add(half)
    joined = parts[0].joined(parts[1])
    assert joined.count == count
    assert torch.allclose(joined.covariance(), moment.covariance(), atol=1e-9)


def test_float32_rows_far_from_the_origin_keep_their_covariance():
    rows = (gaussian(4000, 8) + 1000).float()
    moment = Moment.about(rows[:100])
    for piece in rows.split(100):
        moment.add(piece)
    assert torch.allclose(moment.covariance(), torch.cov(rows.double().mT, correction=0), atol=1e-5)


@pytest.mark.parametrize("center", [True, False])
def test_ranks_are_those_of_the_stored_features(center):
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5)).double()
    batches = [gaussian(7, 3, 6, seed=seed) + 1 for seed in range(4)]
    result = FeatureProbe(model, {"hidden": model[1], "out": model[2]}, center=center).run(batches)
    with torch.no_grad():
        hidden = torch.cat([model[:2](b) for b in batches])
        stored = {"hidden": hidden.flatten(0, 1), "out": model[2](hidden).flatten(0, 1)}
    for name, rows in stored.items():
        layer = result.layers[name]
        assert (layer.tokens, layer.width) == rows.shape
        sigma = torch.linalg.svdvals(rows - rows.mean(0) if center else rows)
        assert torch.allclose(result.spectra[name], sigma / len(rows) ** 0.5, atol=1e-7)
        assert layer.effective_rank == pytest.approx(effective_rank(sigma).item(), rel=1e-6)
        assert layer.stable_rank == pytest.approx(stable_rank(sigma).item(), rel=1e-6)
        assert torch.allclose(result.means[name], rows.mean(0))
        # Sequences are entries of a batch, counted through: even ones in one half.
        sequences = rows.view(28, 3, -1)
        for half, parity in ((layer.effective_rank_halves[0], 0), (layer.effective_rank_halves[1], 1)):
            part = sequences[parity::2].flatten(0, 1)
            sigma = torch.linalg.svdvals(part - part.mean(0) if center else part)
            assert half == pytest.approx(effective_rank(sigma).item(), rel=1e-6)


def test_a_planted_spectrum_is_found_and_random_features_meet_the_null():
    scales = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    model = nn.Linear(6, 6, bias=False).double()
    model.weight.data = torch.linalg.qr(gaussian(6, 6)).Q * scales
    result = FeatureProbe(model, {"out": model}).run([gaussian(20_000, 1, 6, seed=s) for s in range(3)])
    assert torch.allclose(result.spectra["out"], scales, rtol=0.01, atol=1e-6)
    assert result.layers["out"].effective_rank == pytest.approx(effective_rank(scales).item(), rel=0.01)
    model.weight.data = torch.eye(6).double()
    random = FeatureProbe(model, {"out": model}).run([gaussian(300, 1, 6)]).layers["out"]
    assert random.effective_rank == pytest.approx(random.gaussian_effective_rank, rel=0.01)
    assert random.stable_rank == pytest.approx(random.gaussian_stable_rank, rel=0.1)


def test_of_a_language_model_the_attended_tokens_of_the_blocks_count(tiny_llama):
    ids = torch.randint(1, 200, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    result = FeatureProbe(tiny_llama).run([{"input_ids": ids, "attention_mask": mask}])
    with torch.no_grad():
        states = tiny_llama.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    keep = mask.bool()
    keep[:, 0] = False
    rows = states[1][keep].double()
    assert list(result.layers) == ["model.layers.0", "model.layers.1"]
    layer = result.layers["model.layers.0"]
    assert layer.tokens == int(keep.sum()) == 28
    assert layer.effective_rank == pytest.approx(
        effective_rank(torch.linalg.svdvals(rows - rows.mean(0))).item(), rel=1e-4
    )
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["layers"]["model.layers.0"]["tokens"] == 28
    assert result.tensors()["model.layers.1.spectrum"].shape == (16,)


def test_probes_share_a_pass_and_start_afresh_for_the_next():
    model = nn.Linear(4, 3).double()
    batches = [gaussian(6, 2, 4)]
    probe, other = FeatureProbe(model, {"out": model}), FeatureProbe(model, {"out": model}, center=False)
    with pytest.raises(ValueError, match="nothing was seen yet"):
        probe.result()
    stream(model, [*probe.watches(), *[w for w in other.watches()]], batches)
    once = probe.result()
    assert probe.run(batches).to_json() == once.to_json()
    assert other.result().layers["out"].tokens == 12


def test_one_token_has_no_rank():
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="at least 2 tokens for the ranks of out, got 1"):
        FeatureProbe(model, {"out": model}).run([torch.ones(1, 4)])


def test_fewer_tokens_than_dimensions_are_warned_of():
    model = nn.Linear(4, 30).double()
    probe = FeatureProbe(model, {"out": model})
    with pytest.warns(
        UserWarning, match=r"rank: 24 tokens for the 30 dimensions of out, .* \(its halves give \d.* more text"
    ):
        probe.run([gaussian(6, 4, 4)])


def test_one_sequence_has_no_interval():
    model = nn.Linear(4, 3)
    layer = FeatureProbe(model, {"out": model}).run([torch.randn(1, 50, 4)]).layers["out"]
    assert layer.effective_rank_halves is None
    assert layer.stable_rank_halves is None
