"""What chance gives is what random activations have, and running sums are those of sorted rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.probes.sparsity import LEVELS, ascending, chance_curve, chance_needed, curve_at, neurons_needed


@pytest.mark.parametrize("product", [False, True])
def test_chance_is_what_wide_random_layers_have(product):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 20, 40_000, generator=generator, dtype=torch.float64).abs()
    values = a * b if product else a
    ordered = ascending(values)
    needed = neurons_needed(ordered, values.sum(1, keepdim=True)).mean(0) / 40_000
    for level, share in zip(LEVELS, needed.tolist(), strict=True):
        assert chance_needed(level, product) == pytest.approx(share, abs=2e-3)
    profile = (ordered / values.sum(1, keepdim=True)).mean(0).flip(0)
    shares = (0.0, 0.01, 0.05, 0.3, 0.9, 1.0)
    assert chance_curve(product, shares) == pytest.approx(curve_at(profile, shares).tolist(), abs=2e-3)


@given(st.data())
def test_fewest_neurons_by_counting(data):
    width = data.draw(st.integers(1, 8))
    rows = data.draw(st.lists(st.lists(st.integers(0, 50), min_size=width, max_size=width), min_size=1, max_size=4))
    values = torch.tensor(rows, dtype=torch.float64)
    found = neurons_needed(ascending(values), values.sum(1, keepdim=True))
    for row, counts in zip(rows, found.tolist(), strict=True):
        for level, count in zip(LEVELS, counts, strict=True):
            descending = sorted(row, reverse=True)
            fewest = next(n for n in range(width + 1) if sum(descending[:n]) >= level * sum(row) - 1e-9)
            assert count == fewest


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.floats(0, 1))
def test_the_curve_is_linear_between_whole_neurons(sizes, share):
    profile = torch.tensor(sorted(sizes, reverse=True), dtype=torch.float64)
    whole = [0.0, *profile.cumsum(0).tolist()]
    place = share * len(sizes)
    expected = whole[int(place)] + (place % 1) * (0 if place == len(sizes) else profile[int(place)].item())
    assert curve_at(profile, (share,)).item() == pytest.approx(expected, abs=1e-9)
