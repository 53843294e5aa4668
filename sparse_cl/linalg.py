"""Orthonormal bases, low-rank decompositions and projections, batched over leading dimensions.

Matrix products around one op, ``gram_factor``, in full precision whatever the caller allows elsewhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_cl import ops
from sparse_cl.reference.gram_factor import residual_floor
from sparse_cl.reference.precision import full_precision

_WIDE = (torch.float32, torch.float64)
_NARROW = (torch.bfloat16, torch.float16)

#: A unit column that keeps less than this through the second pass was rounding error.
_SECOND_RTOL = 0.5

#: Entries that are orthonormalized together: on a CPU few enough that float64 copies reuse memory that is there.
_AT_ONCE = {"cpu": 1 << 19, "other": 1 << 27}

#: Entries of bfloat16 or float16 that are projected in float32 at a time: on a CPU a slice should stay in the cache;
#: elsewhere each slice costs four launches (256 MB).
_CHUNK = {"cpu": 1 << 22, "other": 1 << 26}


def default_rtol(dtype: torch.dtype, k: int) -> float:
    """Residual, relative to a column's norm, at which k columns count as dependent.

    float32: 1.5 eps √k. Products of rank r < k computed in float32 leave residuals of up to 0.8 eps √k, and matrices of
    condition number 1e6 no less than 2.6 eps √k (k up to 256), so that the former lose columns and the latter do not.
    float64: about 2 √(eps k), below which a Gram matrix shows rounding alone.
    """
    if dtype == torch.float64:
        return math.sqrt(residual_floor(k))
    return 1.5 * torch.finfo(torch.float32).eps * math.sqrt(k)


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
            is dependent. None: see :func:`default_rtol`.

    Returns:
        q, (..., n, k): the orthonormal columns first, zero columns after them. rank, (...) int64: how many there are.

    Raises:
        TypeError: a dtype other than these. ValueError: shapes or devices that do not fit, or rtol outside [0, 1).
    """
    _check_matrix("y", y)
    if against is not None:
        _check_basis("against", against, "y", y, -2)
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(f"rtol: expected a number in [0, 1), got {rtol}")
    y = y.float() if y.dtype in _NARROW else y
    n, k = y.shape[-2:]
    q = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    rank = torch.zeros(y.shape[:-2], dtype=torch.int64, device=y.device)
    if y.numel() == 0:
        return q, rank
    if rtol is None:
        rtol = default_rtol(y.dtype, k)
    flat, ranks = y.reshape(-1, n, k), rank.view(-1)
    if against is not None:
        shared = against.dim() == 2
        bases = against.expand(len(flat), n, -1) if shared else against.reshape(-1, n, against.shape[-1])
    at_once = max(1, _on(_AT_ONCE, y) // (n * k))
    with full_precision(y.device):
        for first in range(0, len(flat), at_once):
            some = slice(first, first + at_once)
            basis = None if against is None else bases[some]
            q.view(-1, n, k)[some], ranks[some] = _orthonormalize(flat[some], basis, rtol)
    return q, rank


def _orthonormalize(y: Tensor, basis: Tensor | None, rtol: float) -> tuple[Tensor, Tensor]:
    """Of (batch, n, k) matrices, each clear of its (n, r) basis."""
    wide = y.double()
    squared_norms = None
    if basis is not None:
        squared_norms = wide.square().sum(-2)
        y = _remove_(_remove_(y.clone(memory_format=torch.contiguous_format), basis), basis)
        wide = y.double()
    # Float64 carries condition numbers up to 1e7 through the squaring in the Gram matrix.
    gram = wide.mT @ wide
    if squared_norms is None:
        squared_norms = gram.diagonal(dim1=-2, dim2=-1)
    t, _ = ops.gram_factor(gram, squared_norms, rtol)
    q = (wide @ t).to(y.dtype)
    if basis is not None:
        q = _remove_(q, basis)
    # Now the condition number is about 1, which the Gram matrix in the dtype itself is enough for.
    t, rank = ops.gram_factor((q.mT @ q).double(), torch.ones_like(squared_norms), _SECOND_RTOL)
    return q @ t.to(y.dtype), rank


def _remove_(y: Tensor, basis: Tensor) -> Tensor:
    """y -= basis basisᵀ y in place, for y of shape (batch, n, k) and a basis of shape (batch, n, r)."""
    return y.baddbmm_(basis, basis.mT @ y, alpha=-1)


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
    _check_matrix("a", a)
    m, n = a.shape[-2:]
    if not 0 <= rank <= min(m, n):
        raise ValueError(f"rank: expected 0 to min(m, n) = {min(m, n)} for a of shape {tuple(a.shape)}, got {rank}")
    for name, value in (("oversample", oversample), ("power_iterations", power_iterations)):
        if value < 0:
            raise ValueError(f"{name}: expected at least 0, got {value}")
    a = a.float() if a.dtype in _NARROW else a
    width = min(rank + oversample, m, n)
    where = a.device if generator is None else generator.device
    test_matrix = torch.randn(n, width, generator=generator, device=where, dtype=torch.float32)
    with full_precision(a.device):
        q, _ = orthonormalize(a @ test_matrix.to(a.device, a.dtype))
        b = a.mT @ q
        blocks, images = [q], [b]
        for _ in range(power_iterations):
            # The blocks before the last are kept as well: they cost no product with a.
            q, _ = orthonormalize(a @ orthonormalize(b)[0], torch.cat(blocks, -1))
            b = a.mT @ q
            blocks.append(q)
            images.append(b)
        q, b = torch.cat(blocks, -1), torch.cat(images, -1)
        # The orthonormal range of b makes the core square, and its SVD independent of m and n.
        v, _ = orthonormalize(b)
        left, s, right = torch.linalg.svd(b.mT.double() @ v.double())
        left, s, right = left[..., :, :rank], s[..., :rank], right[..., :rank, :]
        resolved = s > 8 * torch.finfo(a.dtype).eps * s[..., :1]
        u = q @ (left * resolved[..., None, :]).to(a.dtype)
        vh = (right * resolved[..., :, None]).to(a.dtype) @ v.mT
        return u, (s * resolved).to(a.dtype), vh


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

    _check_matrix("x", x)
    _check_basis("basis", basis, "x", x, -1)
    with full_precision(x.device):
        _project_out(x, basis)
    return x


def _project_out(x: Tensor, basis: Tensor) -> None:
    """Of parts of x that are one matrix or a contiguous batch of them."""
    if x.numel() == 0:
        return
    if x.dim() > 2 and basis.dim() == 2 and x.is_contiguous():
        x = x.view(-1, x.shape[-1])
    if x.dim() > 3 and x.is_contiguous():
        x, basis = x.view(-1, *x.shape[-2:]), basis.reshape(-1, *basis.shape[-2:])
    together = x.dim() == 2 or (x.dim() == 3 == basis.dim() and x.is_contiguous())
    if not together or (x.dim() == 3 and x.dtype != basis.dtype):
        bases = basis if basis.dim() == x.dim() else [basis] * x.shape[0]
        for part, its_basis in zip(x, bases, strict=True):
            _project_out(part, its_basis)
    elif x.dtype == basis.dtype:
        _subtract(x, x @ basis, basis)
    else:
        for rows in x.split(max(1, _on(_CHUNK, x) // x.shape[1])):
            wide = rows.to(basis.dtype)
            _subtract(wide, wide @ basis, basis)
            rows.copy_(wide)


def _subtract(part: Tensor, coefficients: Tensor, basis: Tensor) -> None:
    """part -= coefficients basisᵀ, in place."""
    product = part.addmm_ if part.dim() == 2 else part.baddbmm_
    product(coefficients, basis.mT, alpha=-1)


def _on(sizes: dict[str, int], x: Tensor) -> int:
    return sizes["cpu" if x.device.type == "cpu" else "other"]


def _check_matrix(name: str, x: Tensor) -> None:
    if x.dtype not in _WIDE + _NARROW:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"{name}: expected a matrix or a batch of them, got shape {tuple(x.shape)}")


def _check_basis(name: str, basis: Tensor, x_name: str, x: Tensor, dim: int) -> None:
    """Raises an error unless the rows of ``basis`` fit dimension ``dim`` of ``x``, -1 or -2, and all else fits, too."""
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if basis.dtype != wanted:
        raise TypeError(
            f"{name}: expected {wanted} for {x_name} in {x.dtype}, got {basis.dtype}; convert it with .to({wanted})"
        )
    if basis.device != x.device:
        raise ValueError(
            f"{name}: expected the device of {x_name}, {x.device}, got {basis.device}; "
            f"move it with .to({str(x.device)!r})"
        )
    if basis.dim() not in (2, x.dim()) or basis.shape[:-2] not in (torch.Size(), x.shape[:-2]):
        raise ValueError(
            f"{name}: expected (n, r) or the leading dimensions of {x_name} {tuple(x.shape)}, got {tuple(basis.shape)}"
        )
    if basis.shape[-2] != x.shape[dim]:
        raise ValueError(
            f"{name}: expected {x.shape[dim]} rows, the {'width' if dim == -1 else 'height'} of {x_name} "
            f"{tuple(x.shape)}, got shape {tuple(basis.shape)}"
        )
