"""Feature dimensionality by its definition in float64, its bounds, and its null."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.probes.superposition import feature_dimensionality, random_dimensionality, superposition

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 8))


@given(SIZES, st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_is_its_definition(size, seed, dtype):
    w = torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    w[0] *= seed % 2  # zeros at times
    found, x = feature_dimensionality(w), w.double()
    for i in range(len(x)):
        norm = x[i].norm()
        expected = float(norm**2 / sum((x[i] / norm @ x[j]) ** 2 for j in range(len(x)))) if norm else 0.0
        assert float(found[i]) == pytest.approx(expected, rel=1e-10)
    assert found.min() >= 0 and found.max() <= 1 + 1e-12
    assert float(found.sum()) <= int(torch.linalg.matrix_rank(x)) + 1e-9


def test_known_arrangements():
    assert torch.allclose(feature_dimensionality(3 * torch.eye(4)), torch.ones(4, dtype=torch.float64))
    pairs = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    assert torch.allclose(feature_dimensionality(pairs), torch.full((4,), 0.5, dtype=torch.float64))
    angles = torch.arange(5) * 2 * torch.pi / 5  # a pentagon has 2/5 a feature
    pentagon = torch.stack([angles.cos(), angles.sin()], 1)
    assert torch.allclose(feature_dimensionality(pentagon), torch.full((5,), 0.4, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(("features", "width"), [(200, 64), (64, 256), (1000, 32)])
def test_random_directions_have_the_null(features, width):
    generator = torch.Generator().manual_seed(features)
    w = torch.randn(features, width, generator=generator) * torch.rand(features, 1, generator=generator)
    found, null = feature_dimensionality(w), random_dimensionality(w)
    assert float(found.mean()) == pytest.approx(float(null.mean()), rel=0.03)


def test_of_a_model(tiny_llama):
    with torch.no_grad():
        tiny_llama.model.layers[0].mlp.down_proj.weight[:, 3] = 0
    found = superposition(tiny_llama)
    assert [one.features for one in found.values()] == [23, 24]
    one, w = found["model.layers.1.mlp"], tiny_llama.model.layers[1].mlp.down_proj.weight.mT
    assert one.width == 16
    assert one.mean == pytest.approx(float(feature_dimensionality(w).mean()))
    assert one.null == pytest.approx(float(random_dimensionality(w).mean()))
    assert one.mean <= 16 / 24


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (torch.ones(3), r"vectors: expected \(features, width\), got shape \(3,\)"),
        (torch.full((2, 2), float("nan")), "vectors: expected finite values"),
    ],
)
def test_bad_input(vectors, message):
    with pytest.raises(ValueError, match=message):
        feature_dimensionality(vectors)
