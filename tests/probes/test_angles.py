from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.probes.angles import principal_angles, subspace_overlap


def basis(n, k, seed):
    return torch.linalg.qr(torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


@given(st.lists(st.floats(0, math.pi / 2), min_size=1, max_size=5), st.integers(0, 3), st.integers(0, 1000))
def test_planted_angles_are_found_small_ones_too(planted, more, seed):
    k = len(planted)
    q = basis(2 * k + more + 1, 2 * k + more, seed)
    turned = torch.tensor(planted, dtype=torch.float64)
    u = q[:, :k]
    v = torch.cat([q[:, :k] * turned.cos() + q[:, k : 2 * k] * turned.sin(), q[:, 2 * k :]], 1)
    mixed = v @ basis(k + more, k + more, seed + 1)
    expected = turned.sort().values
    for first, second in ((u, mixed), (mixed, u)):
        torch.testing.assert_close(principal_angles(first, second), expected, rtol=1e-6, atol=1e-12)
        assert subspace_overlap(first, second) == pytest.approx(float(expected.cos().square().mean()), abs=1e-12)


def test_random_spans_share_k_over_n_on_average():
    values = [subspace_overlap(basis(40, 6, 2 * seed), basis(40, 6, 2 * seed + 1)) for seed in range(200)]
    assert sum(values) / 200 == pytest.approx(6 / 40, abs=0.006)


def test_bases_of_other_spaces_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(5, 2\)"):
        principal_angles(basis(4, 2, 0), basis(5, 2, 0))
