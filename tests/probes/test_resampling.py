"""Resamples, halves and reflected intervals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.probes.resampling import halves, reflected_interval, resamples, top_set_interval


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 9))
def test_one_group_less_is_drawn_than_there_are(groups, count, seed):
    drawn = resamples(groups, count, torch.Generator().manual_seed(seed))
    assert drawn.shape == (count, groups)
    assert (drawn.sum(1) == groups - 1).all()


def test_means_of_resamples_vary_as_means_of_fresh_groups():
    values = torch.randn(10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = resamples(10, 40_000, torch.Generator().manual_seed(0))
    means = drawn @ values / drawn.sum(1)
    assert means.mean().item() == pytest.approx(values.mean().item(), abs=0.01)
    assert means.var().item() == pytest.approx(values.var().item() / 10, rel=0.03)


@given(st.integers(2, 20), st.integers(0, 9))
def test_halves_are_half_of_the_groups(groups, seed):
    half = halves(groups, 30, torch.Generator().manual_seed(seed))
    assert set(half.unique().tolist()) <= {0.0, 1.0}
    assert (half.sum(1) == groups // 2).all()


def test_one_group_cannot_be_halved():
    with pytest.raises(ValueError, match="groups: expected at least 2, got 1"):
        halves(1, 3, torch.Generator())


def test_the_interval_is_reflected_at_the_estimate_and_clipped():
    resampled = torch.linspace(0.2, 0.6, 401, dtype=torch.float64)[:, None]
    estimate = torch.tensor([0.5], dtype=torch.float64)
    ((low, high),) = reflected_interval(estimate, resampled).tolist()
    assert (low, high) == pytest.approx((1 - 0.59, 1 - 0.21))
    ((_, high),) = reflected_interval(estimate + 0.3, resampled).tolist()
    assert high == 1


def test_an_interval_of_top_sets_is_moved_and_widened_by_the_bias():
    resampled = 0.4 + torch.tensor([-0.1, 0.1], dtype=torch.float64)[:, None].repeat(500, 1)
    estimate = torch.tensor([0.5], dtype=torch.float64)
    ((low, high),) = top_set_interval(estimate, resampled).tolist()
    reach = 1.96 * (0.1**2 * 1000 / 999 + 2 * 0.1**2) ** 0.5
    assert (low, high) == pytest.approx((0.6 - reach, 0.6 + reach))
    assert top_set_interval(estimate, estimate.repeat(5, 1)).tolist() == [[0.5, 0.5]]
    assert top_set_interval(estimate + 0.4, resampled + 0.4)[0, 1] == 1


def test_a_bias_of_resampling_is_taken_out():
    """A statistic that noise lowers: the resamples are biased once more than the estimate; the interval is not."""
    inside = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, generator=generator, dtype=torch.float64) * 0.05
        estimate = 0.8 - 0.1 + noise
        resampled = estimate - 0.1 + 0.05 * torch.randn(400, 1, generator=generator, dtype=torch.float64)
        ((low, high),) = reflected_interval(estimate, resampled).tolist()
        inside += low <= 0.8 <= high
    assert inside >= 180
