"""Projections of updates on a mask's support: against a least-squares oracle, row by row."""

import pytest
import torch
from cases.subspace import orthogonal

from sparse_cl import ElementMask, Subspace, TwoFourMask
from sparse_cl.optim.subspace_projection import WeightsProjection
from sparse_cl.subspace.subspace import complement_of

N, ROWS = 64, 20


def random_mask(density):
    return ElementMask(torch.rand(ROWS, N, generator=torch.Generator().manual_seed(1)) < density)


def nearest(update, mask, basis):
    """For each row the nearest vector on its support that is orthogonal to the basis: float64."""
    dense = mask.to_dense()
    full = torch.zeros(ROWS, N, dtype=torch.float64)
    full[dense] = update.double().view(-1)
    for row, support in zip(full, dense, strict=True):
        rows = basis[support]
        solution = torch.linalg.lstsq(rows, row[support, None], driver="gelsd").solution
        row[support] -= (rows @ solution)[:, 0]
    return full


def projected(mask, basis, dtype, complement=False):
    update = torch.randn(mask.layout().compact_shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    matrix = complement_of(basis) if complement else basis
    result = update.clone()
    WeightsProjection(Subspace(matrix.to(dtype), complement), mask).apply_(result)
    full = torch.zeros(ROWS, N, dtype=torch.float64)
    full[mask.to_dense()] = result.double().view(-1)
    return update, full


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("complement", [False, True], ids=["basis", "complement"])
@pytest.mark.parametrize(
    ("mask", "rank"),
    [(random_mask(0.5), 0), (random_mask(0.5), 4), (random_mask(0.5), 10), (random_mask(0.9), 24), ("2:4", 10)],
)
def test_the_nearest_update_where_half_of_the_room_is_free(mask, rank, complement, dtype):
    if mask == "2:4":
        choice = torch.rand(ROWS, N // 4, 4, generator=torch.Generator().manual_seed(3)).argsort(-1) < 2
        mask = TwoFourMask(choice.view(ROWS, N))
    basis = orthogonal(N)[:, :rank]
    update, result = projected(mask, basis, dtype, complement)
    expected = nearest(update, mask, basis)
    assert (result - expected).norm() <= 1e-3 * expected.norm()
    assert (result @ basis).square().sum() <= 1e-6 * result.square().sum()


@pytest.mark.parametrize("rank", [33, 40, 64])
def test_what_little_a_crowded_row_may_do_is_not_bounded(rank):
    """The stated limit: with more used directions than active weights the leak shrinks no further than this."""
    mask, basis = random_mask(0.5), orthogonal(N)[:, :rank]
    update, result = projected(mask, basis, torch.float32)
    assert result.norm() <= 0.35 * update.norm()
    assert (result @ basis).norm() <= 0.35 * update.norm()


def test_rows_with_nothing_active_or_nothing_to_remove_stay():
    dense = torch.zeros(ROWS, N, dtype=torch.bool)
    dense[3, :8] = dense[5, 40:] = True
    mask = ElementMask(dense)
    basis = torch.eye(N, dtype=torch.float64)[:, :4]
    update, result = projected(mask, basis, torch.float32)
    assert torch.isfinite(result).all()
    assert torch.equal(result[5, 40:].float(), update[8:])
    assert not result[3, :4].any()
    assert torch.equal(result[3, 4:8].float(), update[4:8])
