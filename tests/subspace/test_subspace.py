"""The used directions of a layer, and how much each is used, as a value."""

import pytest
import torch
from cases.subspace import orthogonal
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl import Subspace


@given(n=st.integers(1, 12), rank=st.integers(0, 12), rows=st.integers(0, 4))
def test_projects_and_measures(n, rank, rows):
    rank = min(rank, n)
    used = orthogonal(n)[:, :rank]
    subspace = Subspace(used)
    x = torch.randn(rows, n, dtype=torch.float64)
    assert (subspace.width, subspace.rank, subspace.free) == (n, rank, n - rank)
    assert torch.allclose(subspace.energies(x), (x @ used).square().sum(0), atol=1e-12)
    y = x.clone()
    assert subspace.project_out_(y) is y
    assert torch.allclose(y, x - x @ used @ used.mT, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rank", [0, 3, 20, 32])
def test_projects_rows_of_any_dtype(dtype, rank):
    x = torch.randn(50, 32).to(dtype)
    expected = x.double() - x.double() @ (u := orthogonal(32)[:, :rank]) @ u.mT
    y = Subspace(u.float()).project_out_(x.clone())
    # Half precision rounds once, after a projection in float32.
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 1e-6)
    assert ((y.double() - expected).abs() <= tolerance * expected.abs() + 1e-6).all()


def test_energies_and_usage_are_in_one_unit():
    q = orthogonal(8)
    plain = Subspace(q[:, :3])
    assert (plain.total, plain.mean, plain.usage.tolist()) == (3.0, 3 / 8, [8 / 3] * 3)
    told = Subspace(q[:, :2], torch.tensor([6.0, 2.0], dtype=torch.float64), outside=8.0, mean=4.0)
    assert (told.total, told.usage.tolist()) == (16.0, [1.5, 0.5])
    narrow = told.to(dtype=torch.float32)
    assert (narrow.basis.dtype, narrow.usage.dtype, narrow.usage.tolist()) == (torch.float32, torch.float32, [1.5, 0.5])
    assert (narrow.total, narrow.mean) == (16.0, 4.0) and told.to(dtype=torch.float64) is told
    assert not Subspace(q[:, :2], torch.zeros(2, dtype=torch.float64)).usage.any()


@given(n=st.integers(1, 16), rank=st.integers(0, 16), data=st.data())
def test_restricted_to_columns_keeps_exactly_what_they_see(n, rank, data):
    """Of rows with entries in these columns alone it says what the whole says: energies, and what is orthogonal."""
    rank = min(rank, n)
    index = torch.tensor(sorted(data.draw(st.sets(st.integers(0, n - 1)))), dtype=torch.int64)
    values = torch.rand(rank, dtype=torch.float64) + (torch.arange(rank) % 3 > 0)
    used = orthogonal(n)[:, :rank]
    subspace = Subspace(used, values, outside=0.5)
    restricted = subspace.restricted(index)
    assert (restricted.width, restricted.outside, restricted.mean) == (len(index), 0.5, subspace.mean)
    assert torch.allclose(restricted.basis.mT @ restricted.basis, torch.eye(restricted.rank, dtype=torch.float64))
    x, full = torch.randn(20, len(index), dtype=torch.float64), torch.zeros(20, n, dtype=torch.float64)
    full[:, index] = x
    expected = (full @ used).square() @ values
    assert torch.allclose((x @ restricted.basis).square() @ restricted.values, expected, atol=1e-10)
    # The nearest row that is orthogonal to the whole basis: no more are refused, no fewer.
    kept = restricted.project_out_(x.clone())
    full[:, index] = kept
    assert not ((full @ used).abs() > 1e-6).any()
    assert torch.allclose(((x - kept) * kept).sum(1), torch.zeros(20, dtype=torch.float64), atol=1e-9)
    assert restricted.free == max(0, len(index) - rank)


def test_refuses_what_is_no_basis():
    q = orthogonal(6).float()
    with pytest.raises(ValueError, match=r"not orthonormal: max\|QᵀQ - I\| is 3, expected at most 0.0001; pass q"):
        Subspace(2 * q[:, :2])
    with pytest.raises(ValueError, match="not orthonormal"):
        Subspace(torch.full((3, 1), torch.nan))
    with pytest.raises(ValueError, match="at most 2 columns for a width of 2, got 6; is it transposed"):
        Subspace(q[:2])
    with pytest.raises(ValueError, match=r"expected shape \(n, r\), got \(6,\)"):
        Subspace(q[0])
    for wrong in (q.bfloat16(), q.long(), [[1.0]]):
        with pytest.raises(TypeError, match="expected a float32 or float64 tensor"):
            Subspace(wrong)


@pytest.mark.parametrize(
    "values",
    [torch.ones(2), torch.ones(3, 1), -torch.ones(3), torch.tensor([1, 1, torch.inf]), torch.full((3,), torch.nan)],
)
def test_refuses_what_are_no_energies(values):
    with pytest.raises(ValueError, match=r"values: expected \(3,\) finite numbers of at least 0.*basis \(6, 3\), got"):
        Subspace(orthogonal(6)[:, :3], values)
    for outside in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="outside: expected an energy of at least 0"):
            Subspace(orthogonal(6)[:, :3], outside=outside)
