"""The linear-algebra functions: bad input is named and explained, and shapes come without values."""

import pytest
import torch

from sparse_cl.linalg import orthonormalize, project_out_, randomized_svd

Y = torch.randn(10, 4)
U = torch.linalg.qr(torch.randn(10, 3))[0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Y.long(),), TypeError, r"y: expected float32, float64, bfloat16 or float16, got torch.int64"),
        ((Y.to(torch.complex64),), TypeError, r"y: expected float32.*got torch.complex64"),
        ((torch.randn(4),), ValueError, r"y: expected a matrix or a batch of them, got shape \(4,\)"),
        (
            (Y, U.double()),
            TypeError,
            r"against: expected torch.float32 for y in torch.float32, got torch.float64; conv",
        ),
        ((Y.bfloat16(), U.bfloat16()), TypeError, r"against: expected torch.float32 for y in torch.bfloat16, got"),
        ((Y, U[:8]), ValueError, r"against: expected 10 rows, the height of y \(10, 4\), got shape \(8, 3\)"),
        (
            (Y, U[None]),
            ValueError,
            r"against: expected \(n, r\) or the leading dimensions of y \(10, 4\), got \(1, 10, 3",
        ),
        ((torch.randn(2, 10, 4), U.expand(3, 10, 3)), ValueError, r"against: .* got \(3, 10, 3\)"),
        ((Y, torch.randn(10)), ValueError, r"against: expected \(n, r\).* got \(10,\)"),
        ((Y, U.to("meta")), ValueError, r"against: expected the device of y, cpu, got meta; move it with .to\('cpu'\)"),
        ((Y, None, -0.1), ValueError, r"rtol: expected a number in \[0, 1\), got -0.1"),
        ((Y, None, 1.0), ValueError, r"rtol: .* got 1.0"),
        ((Y, None, float("nan")), ValueError, r"rtol: .* got nan"),
    ],
)
def test_orthonormalize(arguments, error, message):
    with pytest.raises(error, match=message):
        orthonormalize(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=5), r"rank: expected 0 to min\(m, n\) = 4 for a of shape \(10, 4\), got 5"),
        (dict(rank=-1), r"rank: .* got -1"),
        (dict(rank=2, oversample=-1), r"oversample: expected at least 0, got -1"),
        (dict(rank=2, power_iterations=-2), r"power_iterations: expected at least 0, got -2"),
    ],
)
def test_randomized_svd(options, message):
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        randomized_svd(Y, **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_randomized_svd_of_what_is_no_matrix():
    with pytest.raises(TypeError, match="a: expected float32.*got torch.int64"):
        randomized_svd(Y.long(), 2)
    with pytest.raises(ValueError, match=r"a: expected a matrix or a batch of them, got shape \(3,\)"):
        randomized_svd(torch.ones(3), 1)


@pytest.mark.parametrize(
    ("x", "basis", "error", "message"),
    [
        (Y.mT, U[:9], ValueError, r"basis: expected 10 rows, the width of x \(4, 10\), got shape \(9, 3\)"),
        (Y, U, ValueError, r"basis: expected 4 rows, the width of x \(10, 4\), got shape \(10, 3\)"),
        (Y.mT, U.double(), TypeError, r"basis: expected torch.float32 for x in torch.float32, got torch.float64; conv"),
        (Y.mT.double(), U, TypeError, r"basis: expected torch.float64 for x in torch.float64, got torch.float32"),
        (Y.mT.bfloat16(), U.bfloat16(), TypeError, r"basis: expected torch.float32 for x in torch.bfloat16, got"),
        (Y.mT, U[:, 0], ValueError, r"basis: expected \(n, r\) or the leading dimensions of x \(4, 10\), got \(10,\)"),
        (Y.mT, U[None], ValueError, r"basis: expected \(n, r\) .* got \(1, 10, 3\)"),
        (Y.mT.expand(2, 4, 10), U.expand(3, 10, 3), ValueError, r"basis: .* got \(3, 10, 3\)"),
        (Y.mT, U.to("meta"), ValueError, r"basis: expected the device of x, cpu, got meta; move it with .to\('cpu'\)"),
        (Y.mT.long(), U, TypeError, r"x: expected float32, float64, bfloat16 or float16, got torch.int64"),
        (Y[0], U, ValueError, r"x: expected a matrix or a batch of them, got shape \(4,\)"),
    ],
)
def test_projections(x, basis, error, message):
    before = x.clone()
    with pytest.raises(error, match=message):
        project_out_(x, basis)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_without_values_give_shapes(dtype):
    """What a dry run counts with."""
    y, u = torch.empty(2, 40, 8, device="meta", dtype=dtype), torch.empty(40, 6, device="meta")
    q, rank = orthonormalize(y, u)
    assert (q.shape, q.dtype, rank.shape, rank.dtype) == (y.shape, torch.float32, (2,), torch.int64)
    assert [t.shape for t in randomized_svd(y, 5)] == [(2, 40, 5), (2, 5), (2, 5, 8)]
    assert project_out_(y.mT, u).shape == (2, 8, 40)
