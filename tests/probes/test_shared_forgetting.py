"""Where old outputs moved: against the inputs themselves in float64, two arrangements that are known, and the null."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.probes.inputs import InputMoments
from sparse_cl.probes.shared_forgetting import shared_forgetting
from sparse_cl.subspace.moments import ExactMoment


def moments(x, layers=("a",)):
    halves = tuple(ExactMoment(x.shape[1], torch.float64, torch.device("cpu")) for _ in range(2))
    for half, rows in zip(halves, (x[::2], x[1::2]), strict=True):
        half.add(rows)
    return InputMoments({layers[0]: halves}, {layers[0]: layers}, len(x))


def draws(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 99), st.sampled_from([0.3, 0.9, 1.0]))
def test_against_the_inputs(width, outputs, seed, energy):
    draw = draws(seed)
    x, y = draw(30, width) @ draw(width, width), draw(20, width) @ draw(width, width)
    w, delta = draw(outputs, width), draw(outputs, width)
    found = shared_forgetting(moments(x), moments(y), {"a": delta}, {"a": w}, energy=energy)["a"]
    _, s, v = torch.linalg.svd(y, full_matrices=False)
    held = s.square().cumsum(0) / s.square().sum()
    p = v[: found.rank].mT @ v[: found.rank]
    assert held[found.rank - 1] >= energy - 1e-9 and (found.rank == 1 or held[found.rank - 2] < energy)
    inside, outside = ((x @ q @ delta.mT).square().sum() for q in (p, torch.eye(width, dtype=p.dtype) - p))
    assert found.shared == pytest.approx(float(inside / (inside + outside)), rel=1e-6)
    assert found.null == pytest.approx(float((x @ p).square().sum() / x.square().sum()), rel=1e-6)
    assert found.moved == pytest.approx(float((x @ delta.mT).square().sum() / (x @ w.mT).square().sum()), rel=1e-9)


def test_changes_along_and_across_what_the_new_domain_uses():
    draw = draws(0)
    x, y = draw(50, 6), draw(50, 6) * torch.tensor([1.0, 1, 1, 0, 0, 0])
    for delta, shared in ((draw(4, 6) * y[0].ne(0), 1.0), (draw(4, 6) * y[0].eq(0), 0.0)):
        found = shared_forgetting(moments(x), moments(y), {"a": delta}, energy=1.0)["a"]
        assert (found.rank, found.shared) == (3, pytest.approx(shared, abs=1e-12))


def test_a_random_change_has_the_null():
    draw = draws(1)
    x, y = draw(400, 40) * torch.linspace(0.1, 3, 40), draw(400, 40) * torch.linspace(3, 0.1, 40)
    found = [shared_forgetting(moments(x), moments(y), {"a": draw(200, 40)})["a"] for _ in range(5)]
    assert sum(one.shared for one in found) / 5 == pytest.approx(found[0].null, rel=0.03)


def test_nothing_moved_and_what_cannot_be_read():
    x = draws(2)(10, 4)
    assert shared_forgetting(moments(x), moments(x), {"a": torch.zeros(3, 4)})["a"].to_json()["shared"] is None
    with pytest.raises(ValueError, match="'b' was not probed; there are a"):
        shared_forgetting(moments(x), moments(x), {"b": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match=r"has shape \(3, 5\), expected \(outputs, 4\)"):
        shared_forgetting(moments(x), moments(x), {"a": torch.zeros(3, 5)})
    with pytest.raises(ValueError, match="energy: expected a share"):
        shared_forgetting(moments(x), moments(x), {"a": torch.zeros(3, 4)}, energy=0)
