"""Streamed debiased linear CKA against the kernel formula, and its invariances."""

from __future__ import annotations

import pytest
import torch
from cases.cka import cka_of_kernels, gaussian, hsic_of_kernels
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.probes.cka import PairedMoments


def paired(x, y, pieces=3):
    moments = PairedMoments.about(x[:2], y[:2])
    for a, b in zip(x.tensor_split(pieces), y.tensor_split(pieces), strict=True):
        moments.add(a, b)
    return moments


def close(value, expected, scale):
    return abs(value - expected) <= 1e-9 * scale


@given(st.integers(4, 30), st.integers(1, 8), st.integers(1, 8), st.floats(-30, 30), st.integers(1, 4))
def test_every_hsic_is_that_of_the_kernels(n, width, other, offset, pieces):
    x, y = gaussian(n, width) + offset, 2 * gaussian(n, other, seed=1)
    moments = paired(x, y, pieces)
    scale = 1 + offset**2
    for pair, a, b in (("xx", x, x), ("xy", x, y), ("yy", y, y)):
        expected = hsic_of_kernels(a, b).item()
        assert close(moments.hsic(pair).item(), expected, scale**2 * 100)


def test_cka_is_that_of_the_kernels_in_float64_and_float32():
    x = gaussian(200, 12) * torch.logspace(0, -1, 12)
    y = x @ gaussian(12, 9, seed=1) + gaussian(200, 9, seed=2) + 3
    expected = cka_of_kernels(x, y)
    assert 0.2 < expected < 0.9
    assert paired(x, y).cka() == pytest.approx(expected, rel=1e-10)
    assert paired((x + 50).float(), y.float()).cka() == pytest.approx(expected, rel=1e-4)


def test_rotated_scaled_and_moved_features_have_a_cka_of_one():
    x = gaussian(150, 10) * torch.logspace(0, -2, 10)
    turned = 7 * x @ torch.linalg.qr(gaussian(10, 10, seed=1)).Q + gaussian(10, seed=2)
    assert paired(x, turned).cka() == pytest.approx(1, abs=1e-9)
    stretched = x * torch.logspace(0, 2, 10)
    assert paired(x, stretched).cka() < 0.9


def test_independent_features_have_a_cka_of_zero_on_average_where_the_biased_one_is_far_from_it():
    values, biased = [], []
    for seed in range(40):
        x, y = gaussian(60, 30, seed=seed), gaussian(60, 30, seed=1000 + seed)
        values.append(paired(x, y).cka())
        a, b = x - x.mean(0), y - y.mean(0)
        biased.append(((a.mT @ b).norm() ** 2 / ((a.mT @ a).norm() * (b.mT @ b).norm())).item())
    values = torch.tensor(values)
    assert abs(values.mean()) < 3 * values.std() / 40**0.5 < 0.02
    assert sum(biased) / 40 > 0.3


def test_halves_join_to_the_whole():
    x, y = gaussian(40, 5) + 2, gaussian(40, 6, seed=1)
    whole = paired(x, y)
    even, odd = whole.empty(), whole.empty()
    even.add(x[::2], y[::2])
    odd.add(x[1::2], y[1::2])
    assert even.joined(odd).cka() == pytest.approx(whole.cka(), rel=1e-10)
    assert even.cka() == pytest.approx(cka_of_kernels(x[::2], y[::2]), rel=1e-10)


def test_features_that_do_not_vary_have_no_cka_and_three_tokens_are_too_few():
    x = torch.ones(20, 4, dtype=torch.float64)
    assert paired(x, gaussian(20, 4)).cka() is None
    with pytest.raises(ValueError, match="at least 4 tokens for CKA, got 3"):
        paired(gaussian(3, 2), gaussian(3, 2)).cka()
