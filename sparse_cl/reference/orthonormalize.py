"""Orthonormal columns, batched."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_cl.reference.gram_factor import gram_factor, residual_floor
from sparse_cl.reference.precision import full_precision
from sparse_cl.reference.project_out import remove_

#: A unit column that keeps less than this through the second pass was rounding error.
_SECOND_RTOL = 0.5


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
    dtype, k = y.dtype, y.shape[-1]
    if y.numel() == 0:
        return y.clone(), torch.zeros(y.shape[:-2], dtype=torch.int64, device=y.device)
    if rtol is None:
        rtol = default_rtol(dtype, k)
    with full_precision(y.device):
        squared_norms = torch.linalg.vector_norm(y, dim=-2, dtype=torch.float64).square()
        if against is not None:
            y = remove_(remove_(y.clone(memory_format=torch.contiguous_format), against), against)
        # Float64 carries condition numbers up to 1e7 through the squaring in the Gram matrix.
        wide = y.double()
        t, _ = factor(wide.mT @ wide, squared_norms, rtol)
        q = (wide @ t).to(dtype)
        if against is not None:
            q = remove_(q, against)
        # Now the condition number is about 1, which the Gram matrix in the dtype itself is enough for.
        t, rank = factor((q.mT @ q).double(), torch.ones_like(squared_norms), _SECOND_RTOL)
        return q @ t.to(dtype), rank
