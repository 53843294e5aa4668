"""Resamples, halves and reflected intervals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.probes.resampling import halves, reflected_interval, resamples


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 9))
def test_as_many_groups_are_drawn_as_there_are(groups, count, seed):
    drawn = resamples(groups, count, torch.Generator().manual_seed(seed))
    assert drawn.shape == (count, groups)
    assert (drawn.sum(1) == groups).all()


def test_groups_are_drawn_with_replacement():
    drawn = resamples(10, 20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), torch.ones(10, dtype=torch.float64), rtol=0, atol=0.03)
    torch.testing.assert_close(drawn.var(0), torch.full((10,), 0.9, dtype=torch.float64), rtol=0, atol=0.05)


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
    ((_, high),) = reflected_interval(estimate + 0.3, resampled, None, None).tolist()
    assert high == pytest.approx(1.6 - 0.21)


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
