"""Orthonormal bases, low-rank decompositions and projections, batched over leading dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_cl import ops

_WIDE = (torch.float32, torch.float64)
_NARROW = (torch.bfloat16, torch.float16)


@torch.no_grad()
def orthonormalize(y: Tensor, against: Tensor | None = None, rtol: float | None = None) -> tuple[Tensor, Tensor]:
    """Orthonormal columns that span what the columns of y span outside ``against``.

    Block Gram-Schmidt against the given basis, twice, then CholeskyQR (Stathopoulos & Wu 2002), twice, as
    Yamamoto et al. 2015 do, the first time in float64 and with pivoting, so that dependent columns are found.

    Precision, for float32: products with ``against`` are float32 products, thrice; the first Gram matrix, both k × k
    factors and the first product with a factor are float64; the second pass is float32. TF32 and autocast are off
    inside. So max |QᵀQ − I| and max |againstᵀQ| stay below 1e-5 for any y of finite norm (5e-7 is usual; TF32 products
    leave 6e-5 and 4e-5), and up to a condition number of 1e6 no column is lost. In float64, columns count as dependent
    below a residual of about 1e-7.

    Args:
        y: (..., n, k), float32 or float64; bfloat16 and float16 are computed and returned in float32, since a basis
            rounded to them is no longer orthonormal. Entries must be finite, which is not checked.
        against: (..., n, r) with orthonormal (or zero) columns, in the dtype of the result, or (n, r) for all of y.
        rtol: a column whose part outside ``against`` and the columns already taken is at most ``rtol`` times its norm
            is dependent. None: see :func:`sparse_cl.reference.default_rtol`.

    Returns:
        q, (..., n, k): the orthonormal columns first, zero columns after them. rank, (...) int64: how many there are.

    Raises:
        TypeError: a dtype other than these. ValueError: shapes or devices that do not fit, or rtol outside [0, 1).
    """
    y = _matrix("y", y)
    if against is not None:
        if against.dtype != y.dtype:
            raise TypeError(f"against: expected {y.dtype}, got {against.dtype}; convert it with .to({y.dtype})")
        _same_device("against", against, y, "y")
        if against.dim() not in (2, y.dim()) or against.shape[:-2] not in (torch.Size(), y.shape[:-2]):
            raise ValueError(
                f"against: expected (n, r) or the leading dimensions of y {tuple(y.shape)}, got {tuple(against.shape)}"
            )
        if against.shape[-2] != y.shape[-2]:
            raise ValueError(
                f"against: expected {y.shape[-2]} rows, as y {tuple(y.shape)} has, got {tuple(against.shape)}"
            )
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(f"rtol: expected a number in [0, 1), got {rtol}")
    return ops.orthonormalize(y, against, rtol)


@torch.no_grad()
def randomized_svd(
    a: Tensor, rank: int, oversample: int = 8, power_iterations: int = 1, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular values and vectors of a, from a sketch (Halko, Martinsson & Tropp 2011).

    With power iterations, all their blocks are kept (block Krylov, Musco & Musco 2015): no more products with a, and a
    smaller residual than the last block alone gives. Over the least possible residual, at rank 32 of n up to 4096,
    singular values falling as 1/i: 1.2 % more in the Frobenius norm and 10 % more in the spectral norm after one
    iteration, 0.01 % and less than 0.1 % after two; without any, 50 % and 190 %. Where they fall as 0.9^i, less than
    0.01 % after one.

    Precision: products with a are in a's dtype, with TF32 and autocast off (TF32 leaves the residual as it is, and the
    leading values 1e-5 off instead of 3e-7); the small core is decomposed in float64.

    Args:
        a: (..., m, n), float32 or float64; bfloat16 and float16 are computed and returned in float32.
        rank: how many, at most min(m, n).
        oversample: columns that the sketch has beyond ``rank``.
        power_iterations: products with a aᵀ before the sketch is taken, with orthonormalization between.
        generator: draws the test matrix, which the whole batch shares; the same seed gives the same result.

    Returns:
        u (..., m, rank), s (..., rank) in descending order, vh (..., rank, n). Beyond the numerical rank of a they are
        zero.

    Raises:
        TypeError: a dtype other than these. ValueError: rank, oversample or power_iterations out of range.
    """
    a = _matrix("a", a)
    m, n = a.shape[-2:]
    if not 0 <= rank <= min(m, n):
        raise ValueError(f"rank: expected 0 to min(m, n) = {min(m, n)} for a of shape {tuple(a.shape)}, got {rank}")
    for name, value in (("oversample", oversample), ("power_iterations", power_iterations)):
        if value < 0:
            raise ValueError(f"{name}: expected at least 0, got {value}")
    width = min(rank + oversample, m, n)
    where = a.device if generator is None else generator.device
    test_matrix = torch.randn(n, width, generator=generator, device=where, dtype=torch.float32)
    return ops.randomized_svd(a, test_matrix.to(a.device, a.dtype), rank, power_iterations)


@torch.no_grad()
def project_out_(x: Tensor, basis: Tensor) -> Tensor:
    """x ← x − (x U) Uᵀ in place: what each row of x has in the span of U is removed.

    No temporary of the size of x is made. Orthonormality of U is not checked, since that costs as much as projecting.

    Precision: both products are float32 (float64 for float64), with TF32 and autocast off. Of an x with a share s of
    its energy in the span, below 1e-12 / (1 − s) of the remaining energy then lies in it. TF32 products would leave
    1e-7 / (1 − s), which is above 1e-6 where more than nine tenths are removed. Storing x in bfloat16 leaves more.

    Args:
        x: (..., m, n), float32, float64, bfloat16 or float16; the last two pass through float32 some rows at a time.
        basis: U, (n, r) or (..., n, r), orthonormal columns, on x's device, float64 if x is and float32 otherwise.

    Returns:
        x itself.

    Raises:
        TypeError: a dtype other than these. ValueError: a shape or device that does not fit.
    """
    _check_projection(x, basis)
    ops.project_out_(x, basis)
    return x


@torch.no_grad()
def project_onto_(x: Tensor, basis: Tensor) -> Tensor:
    """x ← (x U) Uᵀ in place: only what each row of x has in the span of U is kept. As :func:`project_out_`."""
    _check_projection(x, basis)
    ops.project_onto_(x, basis)
    return x


def _matrix(name: str, x: Tensor) -> Tensor:
    if x.dtype not in _WIDE + _NARROW:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"{name}: expected a matrix or a batch of them, got shape {tuple(x.shape)}")
    return x.float() if x.dtype in _NARROW else x


def _same_device(name: str, given: Tensor, other: Tensor, other_name: str) -> None:
    if given.device != other.device:
        raise ValueError(
            f"{name}: expected the device of {other_name}, {other.device}, got {given.device}; "
            f"move it with .to({str(other.device)!r})"
        )


def _check_projection(x: Tensor, basis: Tensor) -> None:
    if x.dtype not in _WIDE + _NARROW:
        raise TypeError(f"x: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"x: expected a matrix or a batch of them, got shape {tuple(x.shape)}")
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if basis.dtype != wanted:
        raise TypeError(
            f"basis: expected {wanted} for x in {x.dtype}, got {basis.dtype}; convert it with .to({wanted})"
        )
    _same_device("basis", basis, x, "x")
    if basis.dim() not in (2, x.dim()) or basis.shape[:-2] not in (torch.Size(), x.shape[:-2]):
        raise ValueError(
            f"basis: expected (n, r) or the leading dimensions of x {tuple(x.shape)}, got {tuple(basis.shape)}"
        )
    if basis.shape[-2] != x.shape[-1]:
        raise ValueError(
            f"basis: expected {x.shape[-1]} rows, the width of x {tuple(x.shape)}, got shape {tuple(basis.shape)}"
        )
