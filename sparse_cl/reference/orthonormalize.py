"""Orthonormal columns, batched."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .gram_factor import gram_factor, residual_floor
from .precision import full_precision
from .project_out import remove_

#: A unit column that keeps less than this through the second pass was rounding error.
_SECOND_RTOL = 0.5

#: Entries that are orthonormalized together: on a CPU few enough that float64 copies reuse memory that is there.
_AT_ONCE = {"cpu": 1 << 19, "other": 1 << 27}


def default_rtol(dtype: torch.dtype, k: int) -> float:
    """Residual, relative to a column's norm, at which k columns count as dependent.

    float32: 1.5 eps √k. Products of rank r < k computed in float32 leave residuals of up to 0.8 eps √k, and matrices of
    condition number 1e6 no less than 2.6 eps √k (k up to 256), so that the former lose columns and the latter do not.
    float64: about 2 √(eps k), below which a Gram matrix shows rounding alone.
    """
    if dtype == torch.float64:
        return math.sqrt(residual_floor(k))
    return 1.5 * torch.finfo(torch.float32).eps * math.sqrt(k)


def orthonormalize(
    y: Tensor,
    against: Tensor | None = None,
    rtol: float | None = None,
    factor: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = gram_factor,
) -> tuple[Tensor, Tensor]:
    """:func:`sparse_cl.linalg.orthonormalize` on float32 or float64 tensors; ``factor`` is gram_factor or its like."""
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
    at_once = max(1, _AT_ONCE["cpu" if y.is_cpu else "other"] // (n * k))
    with full_precision(y.device):
        for first in range(0, len(flat), at_once):
            some = slice(first, first + at_once)
            basis = None if against is None else bases[some]
            q.view(-1, n, k)[some], ranks[some] = _orthonormalize(flat[some], basis, rtol, factor)
    return q, rank


def _orthonormalize(y: Tensor, basis: Tensor | None, rtol: float, factor: Callable) -> tuple[Tensor, Tensor]:
    """Of (batch, n, k) matrices, each clear of its (n, r) basis."""
    wide = y.double()
    squared_norms = None
    if basis is not None:
        squared_norms = wide.square().sum(-2)
        y = remove_(remove_(y.clone(memory_format=torch.contiguous_format), basis), basis)
        wide = y.double()
    # Float64 carries condition numbers up to 1e7 through the squaring in the Gram matrix.
    gram = wide.mT @ wide
    if squared_norms is None:
        squared_norms = gram.diagonal(dim1=-2, dim2=-1)
    t, _ = factor(gram, squared_norms, rtol)
    q = (wide @ t).to(y.dtype)
    if basis is not None:
        q = remove_(q, basis)
    # Now the condition number is about 1, which the Gram matrix in the dtype itself is enough for.
    t, rank = factor((q.mT @ q).double(), torch.ones_like(squared_norms), _SECOND_RTOL)
    return q @ t.to(y.dtype), rank
