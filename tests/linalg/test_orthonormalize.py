"""orthonormalize: orthonormal columns, the right span, the right rank; with the native factor and the reference's."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl import ops, reference
from sparse_cl.linalg import default_rtol, orthonormalize

ORTHONORMAL = 1e-5


@pytest.fixture(params=["native", "reference"])
def op(request, monkeypatch):
    """orthonormalize with the native factor, if it was built, and with the reference's."""
    if request.param == "reference":
        monkeypatch.setattr(ops, "gram_factor", reference.gram_factor)
    return orthonormalize


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def basis(n, r, seed=0, dtype=torch.float32):
    return torch.linalg.qr(gaussian(n, r, seed=seed, dtype=torch.float64))[0].to(dtype)


def with_spectrum(n, k, spectrum):
    wide = basis(n, k, dtype=torch.float64) * spectrum
    return (wide @ basis(k, k, seed=1, dtype=torch.float64).mT).float()


def check(q, rank, against=None, bound=ORTHONORMAL):
    """What is promised of any result, whatever the columns were."""
    wide = q.double()
    ones = (torch.arange(q.shape[-1]) < rank[..., None]).double()
    assert ((wide.mT @ wide - torch.diag_embed(ones)).abs() <= bound).all()
    assert not wide.mT[ones == 0].any()
    if against is not None:
        assert ((against.double().mT @ wide).abs() <= bound).all()


def sine(q, expected):
    """Sine of the largest principal angle between two spans of one dimension."""
    wide = q.double()
    return torch.linalg.matrix_norm(wide - expected @ (expected.mT @ wide), ord=2).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (64, 64), (300, 33), (1024, 128), (513, 256)])
def test_span_is_that_of_householder_qr(op, shape, dtype):
    y = gaussian(*shape, dtype=dtype)
    q, rank = op(y)
    assert q.dtype == dtype
    assert rank.item() == shape[1]
    check(q, rank, bound=1e-12 if dtype == torch.float64 else ORTHONORMAL)
    assert sine(q, torch.linalg.qr(y.double())[0]) <= (1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("k", [4, 32, 128, 256])
@pytest.mark.parametrize("kind", ["geometric", "one small"])
def test_condition_1e6_keeps_every_column(op, k, kind):
    spectrum = torch.logspace(0, -6, k, dtype=torch.float64)
    if kind == "one small":
        spectrum[1:-1] = 1
    y = with_spectrum(4 * k, k, spectrum)
    q, rank = op(y)
    assert rank.item() == k
    check(q, rank)
    # No more is lost than a float64 factorization of the same float32 numbers loses by storing Q in float32.
    assert sine(q, torch.linalg.qr(y.double())[0]) <= 1e-4


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e18])
def test_scale_of_the_columns_does_not_matter(op, scale):
    y = gaussian(200, 40)
    y[:, ::2] *= scale
    q, rank = op(y)
    assert rank.item() == 40
    check(q, rank)
    assert sine(q, torch.linalg.qr(gaussian(200, 40).double())[0]) <= 1e-4


@pytest.mark.parametrize("n", [300, 4096])
@pytest.mark.parametrize("r", [1, 2, 16, 100, 127, 200, 255, 256])
def test_products_of_lower_rank_computed_in_float32(r, n):
    y = gaussian(n, r) @ gaussian(r, 256, seed=1)
    q, rank = orthonormalize(y)
    assert rank.item() == r
    check(q, rank)


@given(
    n=st.integers(1, 120), k=st.integers(1, 48), r=st.integers(1, 48), old=st.integers(0, 30), seed=st.integers(0, 99)
)
def test_any_rank_beside_any_basis(n, k, r, old, seed):
    """A product of rank r in general position has min(r, k, what the basis leaves of n) new directions."""
    old = min(old, n)
    u = basis(n, old, seed=seed)
    y = gaussian(n, r, seed=seed + 1) @ gaussian(r, k, seed=seed + 2)
    q, rank = orthonormalize(y, u)
    check(q, rank, u)
    assert rank.item() == min(n - old, k, r)


def test_columns_that_are_zero_twice_there_or_in_the_basis(op):
    u = basis(256, 60)
    y = gaussian(256, 24, seed=3)
    y[:, 3] = 0
    y[:, 10] = y[:, 2] * 7
    y[:, 15] = y[:, 1] - y[:, 5]
    y[:, 20] = u @ gaussian(60)
    q, rank = op(y, u)
    assert rank.item() == 20
    check(q, rank, u)
    kept = [j for j in range(24) if j not in (3, 10, 15, 20)]
    outside = y[:, kept].double() - u.double() @ (u.double().mT @ y[:, kept].double())
    assert sine(q[:, :20], torch.linalg.qr(outside)[0]) <= 1e-4


@pytest.mark.parametrize("share", [1e-1, 1e-3, 1e-4])
def test_little_outside_the_basis_is_found_and_is_outside(op, share):
    u = basis(512, 200, dtype=torch.float64)
    new = basis(512, 220, dtype=torch.float64)[:, 200:]
    new = torch.linalg.qr(new - u @ (u.mT @ new))[0]
    y = (u @ gaussian(200, 16, dtype=torch.float64) / math.sqrt(200) + share * new[:, :16]).float()
    q, rank = op(y, u.float())
    assert rank.item() == 16
    check(q, rank, u)
    assert sine(q, new[:, :16]) <= 3e-6 / share


def test_all_inside_the_basis_leaves_nothing(op):
    for n, r, k in ((40, 40, 8), (500, 300, 64), (2048, 100, 128)):
        u = basis(n, r)
        q, rank = op(u @ gaussian(r, k), u)
        assert rank.item() == 0
        assert not q.any()


def test_a_batch_is_a_loop_of_its_matrices():
    y, u = gaussian(2, 3, 200, 32), torch.stack([basis(200, 50, seed=s) for s in range(6)]).view(2, 3, 200, 50)
    y[1, 0] = gaussian(200, 5) @ gaussian(5, 32)
    y[0, 2, :, 7] = 0
    for against in (None, u, u[0, 1]):
        q, rank = orthonormalize(y, against)
        assert rank[1, 0] == 5 and rank[0, 2] == 31
        for i in range(2):
            for j in range(3):
                mine = against[i, j] if against is u else against
                one, its_rank = orthonormalize(y[i, j], mine)
                assert rank[i, j] == its_rank
                torch.testing.assert_close(q[i, j], one, rtol=0, atol=2e-6)


def test_a_basis_is_left_as_it_is():
    u = basis(300, 80)
    q, rank = orthonormalize(u)
    assert rank.item() == 80
    torch.testing.assert_close(q, u, rtol=0, atol=1e-6)


def test_arguments_are_not_written_to():
    for dtype in (torch.float32, torch.float64):
        y, u = gaussian(60, 9, dtype=dtype), basis(60, 5, dtype=dtype)
        copies = y.clone(), u.clone()
        orthonormalize(y, u)
        assert torch.equal(y, copies[0]) and torch.equal(u, copies[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_computed_and_returned_in_float32(dtype):
    y = gaussian(200, 30).to(dtype)
    q, rank = orthonormalize(y)
    expected, _ = orthonormalize(y.float())
    assert torch.equal(q, expected)
    check(q, rank)


def test_strided_arguments():
    y, u = gaussian(4, 30, 100).mT, basis(100, 20)
    assert not y.is_contiguous()
    for against in (None, u, u.mT.contiguous().mT):
        for mine, expected in zip(orthonormalize(y, against), orthonormalize(y.contiguous(), against), strict=True):
            torch.testing.assert_close(mine, expected, rtol=0, atol=2e-6)


def test_rtol_is_a_share_of_the_norm_before_anything_was_removed():
    u = basis(100, 10)
    outside = basis(100, 30)[:, 10:18]
    y = u[:, :8] + torch.tensor([1e-1, 3e-2, 3e-3, 1e-3, 1e-1, 3e-2, 3e-3, 1e-3]) * outside
    for rtol, expected in ((1e-4, 8), (2e-3, 6), (1e-2, 4), (5e-2, 2)):
        q, rank = orthonormalize(y, u, rtol=rtol)
        assert rank.item() == expected
        check(q, rank, u)
    assert orthonormalize(y, rtol=1e-2)[1].item() == 8


@given(st.integers(1, 60), st.integers(1, 40))
def test_rtol_zero_never_brings_nan_or_a_skewed_basis(n, k):
    y = gaussian(n, 3) @ gaussian(3, k, seed=1)
    q, rank = orthonormalize(y, rtol=0.0)
    check(q, rank)
    assert rank >= min(n, k, 3)


def test_default_rtol_lies_between_what_it_must_tell_apart():
    for k in (1, 16, 256):
        assert default_rtol(torch.float32, k) == pytest.approx(1.5 * 2**-23 * math.sqrt(k))
        assert 2 * math.sqrt(2**-52 * k) <= default_rtol(torch.float64, k) <= 1e-6


@pytest.mark.parametrize(
    ("shape", "old"), [((0, 5, 3), 0), ((5, 0, 3), 0), ((0, 3), 0), ((5, 0), 2), ((2, 4, 6, 3), 0), ((4, 2), 4)]
)
def test_nothing_to_orthonormalize(op, shape, old):
    y = gaussian(*shape)
    u = basis(shape[-2], old)
    q, rank = op(y, u)
    assert q.shape == shape and rank.shape == shape[:-2]
    check(q, rank, u)
    assert (rank == (min(shape[-2] - old, shape[-1]))).all()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_settings_of_the_caller_neither_matter_nor_change(precision):
    y = gaussian(300, 64)
    expected = orthonormalize(y)[0]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mine = orthonormalize(y)[0]
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(mine, expected)
