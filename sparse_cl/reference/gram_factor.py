"""Factor of a Gram matrix that turns its columns into orthonormal ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: A column is taken in its turn unless its squared relative residual is below this share of the largest: orthonormal
#: columns keep their order, and a lower share lets the noise of dependent columns grow.
PIVOT_SHARE = 0.9


def residual_floor(k: int) -> float:
    """Squared residual of a unit column that is rounding error of a float64 Gram matrix of k columns."""
    return (64 + 4 * k) * torch.finfo(torch.float64).eps


def gram_factor(gram: Tensor, squared_norms: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    """T with Tᵀ G T = diag(1, ..., 1, 0, ..., 0) for Gram matrices G = Yᵀ Y, so that Y T has orthonormal columns.

    Pivoted Cholesky (Higham 2002, section 10.3) of G scaled to unit diagonal. A column is dependent on those taken
    before it if its squared residual is at most rtol² times ``squared_norms``, or is rounding error of float64.

    Args:
        gram: (..., k, k) float64, symmetric.
        squared_norms: (..., k) float64, of the columns of Y before anything was removed from them.
        rtol: what counts as dependent.

    Returns:
        T, (..., k, k) float64: independent columns first, the others zero. Rows of dependent columns are zero.
        rank, (...) int64. A column with a diagonal that is not positive and finite is dependent.
    """
    _check(gram, squared_norms)
    k = gram.shape[-1]
    batch = math.prod(gram.shape[:-2])
    g = gram.reshape(batch, k, k)
    diagonal = g.diagonal(dim1=-2, dim2=-1)
    norms = squared_norms.reshape(batch, k)
    usable = (diagonal > 0) & diagonal.isfinite() & (norms > 0)
    scale = torch.where(usable, diagonal.rsqrt(), 0.0)
    share = torch.where(usable, (diagonal / norms).clamp(max=1.0), 0.0)
    scaled = torch.where(usable[:, :, None] & usable[:, None, :], g * scale[:, :, None] * scale[:, None, :], 0.0)

    residual = usable.double()
    work = g.new_zeros(batch, k, k)
    open_ = usable.clone()
    rank = torch.zeros(batch, dtype=torch.int64, device=g.device)
    for j in range(k):
        relative = residual * share
        candidate = open_ & (relative > rtol * rtol) & (residual > residual_floor(k))
        relative = torch.where(candidate, relative, 0.0)
        eligible = candidate & (relative >= PIVOT_SHARE * relative.amax(-1, keepdim=True))
        found = eligible.any(-1, keepdim=True)
        if g.device.type == "cpu" and not found.any():
            break
        pivot = eligible.int().argmax(-1, keepdim=True)
        is_pivot = torch.zeros_like(usable).scatter_(1, pivot, found)
        # Row i of work holds row i of the Cholesky factor where a column is open, and column i of T where it is not.
        coefficients = work.gather(2, pivot[:, None, :].expand(batch, k, 1))
        work.masked_fill_(is_pivot[:, None, :], 0.0)
        row = scaled.gather(1, pivot[:, :, None].expand(batch, 1, k)).squeeze(1)
        row = torch.where(is_pivot, 1.0, row * open_) - (coefficients.mT @ work).squeeze(1)
        row = torch.where(found, row * residual.gather(1, pivot).rsqrt(), 0.0)
        open_ &= ~is_pivot
        residual = torch.where(open_, residual - row.square(), 0.0)
        work[:, j] = row
        rank += found[:, 0]
    taken = usable & ~open_
    factor = torch.where(taken[:, :, None], scale[:, :, None] * work.mT, 0.0)
    return factor.view(gram.shape), rank.view(gram.shape[:-2])


def _check(gram: Tensor, squared_norms: Tensor) -> None:
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2] or gram.dtype != torch.float64:
        raise RuntimeError("gram_factor: gram: expected square float64 matrices")
    fits = squared_norms.shape == gram.shape[:-1] and squared_norms.dtype == gram.dtype
    if not fits or squared_norms.device != gram.device:
        raise RuntimeError("gram_factor: squared_norms: expected one float64 number a column of gram, on its device")
