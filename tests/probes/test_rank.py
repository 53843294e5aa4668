"""Ranks of spectra with a known answer, of random matrices, and of planted updates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_cl.probes.rank import effective_rank, gaussian_singular_values, stable_rank, update_rank


@pytest.mark.parametrize("k", [1, 3, 17])
def test_equal_values_count_and_zeros_do_not(k):
    sigma = torch.cat([torch.full((k,), 2.5), torch.zeros(5)])
    assert effective_rank(sigma).item() == pytest.approx(k, rel=1e-12)
    assert stable_rank(sigma).item() == pytest.approx(k, rel=1e-12)


def test_two_values_by_hand():
    sigma = torch.tensor([3.0, 1.0])
    # Shares 3/4 and 1/4: entropy ln 4 - (3/4) ln 3.
    assert effective_rank(sigma).item() == pytest.approx(4 / 3**0.75, rel=1e-12)
    assert stable_rank(sigma).item() == pytest.approx(10 / 9, rel=1e-12)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30), st.floats(1e-3, 1e3))
def test_ranks_lie_between_one_and_the_count_whatever_the_scale(values, scale):
    sigma = torch.tensor(values, dtype=torch.float64)
    for rank in (effective_rank, stable_rank):
        assert 1 - 1e-9 <= rank(sigma).item() <= len(values) * (1 + 1e-9)
        assert rank(sigma * scale).item() == pytest.approx(rank(sigma).item(), rel=1e-9)
        assert rank(sigma.flip(0)).item() == pytest.approx(rank(sigma).item(), rel=1e-9)


def test_a_batch_is_its_rows_and_no_value_is_rank_zero():
    sigma = torch.rand(4, 7, generator=torch.Generator().manual_seed(0))
    sigma[2] = 0
    for rank in (effective_rank, stable_rank):
        assert torch.equal(rank(sigma), torch.stack([rank(row) for row in sigma]))
        assert rank(sigma)[2] == 0
        assert rank(torch.zeros(0)) == 0


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("rank", [effective_rank, stable_rank])
def test_what_is_no_singular_value_is_refused(rank, bad):
    with pytest.raises(ValueError, match=r"singular_values: expected finite .* not negative"):
        rank(torch.tensor([1.0, bad]))


@pytest.mark.parametrize(("rows", "columns"), [(400, 40), (40, 400), (60, 60)])
def test_the_gaussian_spectrum_has_the_law_of_a_whole_matrix(rows, columns):
    """Moments over draws, beside those of matrices that are drawn in full."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.stack(
        [torch.linalg.svdvals(torch.randn(rows, columns, generator=generator).double()) for _ in range(60)]
    )
    quick = torch.stack([gaussian_singular_values(rows, columns, seed) for seed in range(60)])
    error = (whole.var(0) / 60 + quick.var(0) / 60).sqrt()
    assert ((whole.mean(0) - quick.mean(0)).abs() < 4.5 * error).all()
    assert quick.square().sum(1).mean().item() == pytest.approx(rows * columns, rel=0.01)
    assert effective_rank(quick).mean().item() == pytest.approx(effective_rank(whole).mean().item(), rel=2e-3)
    with pytest.raises(ValueError, match="rows and columns: expected at least 1"):
        gaussian_singular_values(0, 3)


def planted(m, n, values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, len(values), generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64)).Q
    return u @ torch.tensor(values, dtype=torch.float64).diag() @ v.mT


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
def test_an_update_has_the_spectrum_that_was_planted(shape):
    before = {
        "w": torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
        "b": torch.ones(3),
    }
    values = [5.0, 2.0, 2.0, 1e-3]
    after = {"w": before["w"] + planted(*shape, values), "b": torch.zeros(3)}
    result = update_rank(before, after)
    assert list(result.weights) == ["w"], "a bias has no rank"
    sigma = result.singular_values["w"]
    assert torch.allclose(sigma[:4], torch.tensor(values, dtype=torch.float64), rtol=1e-8)
    assert sigma[4:].max() <= 1e-7
    update = result.weights["w"]
    assert update.stable_rank == pytest.approx((25 + 8 + 1e-6) / 25, rel=1e-6)
    shares = torch.tensor(values, dtype=torch.float64) / sum(values)
    assert update.effective_rank == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-5)
    assert update.change == pytest.approx(((33 + 1e-6) ** 0.5) / before["w"].norm().item(), rel=1e-9)
    assert update.effective_rank < update.gaussian_effective_rank <= 12
    assert result.to_json()["weights"]["w"]["shape"] == list(shape)
    assert torch.equal(result.tensors()["w.update_singular_values"], sigma)


def test_no_update_has_rank_zero_and_a_model_is_compared_by_its_parameters():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))
    result = update_rank(model, {name: p.clone() for name, p in model.named_parameters()}, names=["1.weight"])
    assert list(result.weights) == ["1.weight"]
    assert (result.weights["1.weight"].effective_rank, result.weights["1.weight"].change) == (0.0, 0.0)


def test_a_state_dict_is_compared_with_the_model_that_it_is_of():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model[0].weight.add_(1.0)
    for pair in ((before, model), (model, before)):
        assert list(update_rank(*pair).weights) == ["0.weight"]


def test_checkpoints_of_different_structure_are_refused_by_name():
    w = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"b is \(2, 2\) before and \(3, 2\) after"):
        update_rank({"a": w, "b": w}, {"a": w, "b": torch.ones(3, 2)})
    with pytest.raises(ValueError, match="b is only in the one after"):
        update_rank({"a": w}, {"a": w, "b": w})
    with pytest.raises(ValueError, match="names: 'c' is no matrix .* there are a"):
        update_rank({"a": w}, {"a": w}, names=["c"])
    with pytest.raises(ValueError, match="at least one matrix"):
        update_rank({"a": w[0]}, {"a": w[0]})
