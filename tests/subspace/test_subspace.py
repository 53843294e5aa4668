"""The used directions of a layer as a value: the same whether they or their complement are stored."""

import pytest
import torch
from cases.subspace import largest_angle, orthogonal
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl import Subspace
from sparse_cl.subspace.subspace import complement_of, smaller_half


def both_forms(n, rank, dtype=torch.float64):
    q = orthogonal(n).to(dtype)
    return Subspace(q[:, :rank]), Subspace(q[:, rank:], complement=True)


@given(n=st.integers(1, 12), rank=st.integers(0, 12), rows=st.integers(0, 4))
def test_both_forms_project_and_measure_alike(n, rank, rows):
    rank = min(rank, n)
    used = orthogonal(n)[:, :rank]
    x = torch.randn(rows, n, dtype=torch.float64)
    for subspace in both_forms(n, rank):
        assert (subspace.width, subspace.rank, subspace.free) == (n, rank, n - rank)
        assert torch.allclose(subspace.basis() @ subspace.basis().mT, used @ used.mT, atol=1e-12)
        assert torch.allclose(subspace.used_energy(x), (x @ used).square().sum(), atol=1e-12)
        y = x.clone()
        assert subspace.project_out_(y) is y
        assert torch.allclose(y, x - x @ used @ used.mT, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rank", [0, 3, 20, 32])
def test_projects_rows_of_any_dtype(dtype, rank):
    x = torch.randn(50, 32).to(dtype)
    expected = x.double() - x.double() @ (u := orthogonal(32)[:, :rank]) @ u.mT
    for subspace in both_forms(32, rank, torch.float32):
        y = subspace.project_out_(x.clone())
        # Half precision rounds once, after a projection in float32.
        tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 1e-6)
        assert ((y.double() - expected).abs() <= tolerance * expected.abs() + 1e-6).all()


@pytest.mark.parametrize("rank", [2, 6, 10])
@pytest.mark.parametrize("added", [0, 1, 2])
def test_extended_takes_new_directions_in(rank, added):
    q = orthogonal(12)
    for subspace in both_forms(12, rank):
        longer = subspace.extended(q[:, rank : rank + added])
        assert longer.rank == rank + added
        assert largest_angle(longer.basis(), q[:, : rank + added]) <= 1e-12
        assert longer.complement == (subspace.complement or (added > 0 and rank + added > 6))


def test_the_smaller_half_is_stored():
    q = orthogonal(9)
    for rank in range(10):
        subspace = smaller_half(q[:, :rank])
        assert subspace.rank == rank
        assert subspace.matrix.shape[1] == min(rank, 9 - rank)
    complement = complement_of(q[:, :4])
    assert torch.allclose(torch.cat([q[:, :4], complement], 1).mT @ q[:, :4], torch.eye(9, dtype=q.dtype)[:, :4])


@pytest.mark.parametrize("rank", [0, 1, 5, 11, 15, 16])
@pytest.mark.parametrize("columns", [[], [3], [0, 4, 5, 9], list(range(2, 14)), list(range(16))])
def test_restricted_to_columns_keeps_exactly_what_they_can_do(rank, columns):
    """Rows with entries in these columns alone, orthogonal to the whole basis: no more are refused, no fewer."""
    index = torch.tensor(columns, dtype=torch.int64)
    for subspace in both_forms(16, rank):
        restricted = subspace.restricted(index)
        used = orthogonal(16)[:, :rank]
        x = torch.randn(40, len(columns), dtype=torch.float64)
        kept = restricted.project_out_(x.clone())
        full = torch.zeros(40, 16, dtype=torch.float64)
        full[:, index] = kept
        assert (full @ used).abs().max() <= 1e-6 if rank else torch.equal(kept, x)
        assert restricted.free == max(0, len(columns) - rank)
        # The nearest such row: what was taken off is orthogonal to what was kept.
        assert torch.allclose(((x - kept) * kept).sum(1), torch.zeros(40, dtype=torch.float64), atol=1e-9)


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
