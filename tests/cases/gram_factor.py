"""Gram matrices that every implementation of gram_factor is tested on, and how."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparse_cl import reference
from sparse_cl.reference.gram_factor import residual_floor

RTOL = 1e-5


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conditioned(n: int, k: int, condition: float) -> Tensor:
    """(n, k) with singular values from 1 down to 1 / condition."""
    left, right = torch.linalg.qr(gaussian(n, k))[0], torch.linalg.qr(gaussian(k, k, seed=1))[0]
    return left * torch.logspace(0, -np.log10(condition), k, dtype=torch.float64) @ right.mT


def duplicates(n: int, k: int) -> Tensor:
    """(n, k) of which the second half repeats the first, scaled."""
    y = gaussian(n, k)
    y[:, k // 2 :] = -3 * y[:, : k - k // 2]
    return y


def with_zeros(n: int, k: int) -> Tensor:
    y = gaussian(n, k)
    y[:, ::3] = 0
    return y


def far_apart(n: int, k: int) -> Tensor:
    """(n, k) whose columns differ by up to 200 orders of magnitude."""
    return gaussian(n, k) * torch.logspace(-100, 100, k, dtype=torch.float64)


#: Name: y (..., n, k), the rank of each matrix.
CASES = {
    "one": (gaussian(3, 1), 1),
    "odd": (gaussian(9, 7), 7),
    "full": (gaussian(70, 33), 33),
    "batch": (gaussian(2, 3, 40, 20), [[20] * 3] * 2),
    "wide": (gaussian(5, 21), 5),
    "zero": (torch.zeros(6, 4, dtype=torch.float64), 0),
    "some_zero": (with_zeros(40, 18), 12),
    "duplicates": (duplicates(50, 24), 12),
    "rank 5": (gaussian(60, 5) @ gaussian(5, 32, seed=1), 5),
    "condition 1e3": (conditioned(80, 40, 1e3), 40),
    "far apart": (far_apart(50, 30), 30),
    "orthonormal": (torch.linalg.qr(gaussian(90, 36))[0], 36),
    "past_shared_memory": (gaussian(2, 130, 100), [100] * 2),
    "large": (gaussian(200, 129), 129),
}


def gram_of(y: Tensor) -> tuple[Tensor, Tensor]:
    gram = y.mT @ y
    return gram, gram.diagonal(dim1=-2, dim2=-1).contiguous()


def identity_error(factor: Tensor, rank: Tensor, gram: Tensor) -> float:
    """Largest entry of Tᵀ G T − diag(1, ..., 1, 0, ..., 0), the products taken in extended precision."""
    k = gram.shape[-1]
    worst = 0.0
    for t, r, g in zip(factor.reshape(-1, k, k), rank.reshape(-1), gram.reshape(-1, k, k), strict=True):
        wide = t.numpy().astype(np.longdouble)
        # One side at a time keeps columns that differ by 200 orders of magnitude within range.
        product = wide.T @ (g.numpy().astype(np.longdouble) @ wide)
        product[range(int(r)), range(int(r))] -= 1
        worst = max(worst, float(np.abs(product).max(initial=0)))
    return worst


def check(op, name: str, device: str = "cpu") -> None:
    y, expected = CASES[name]
    gram, norms = gram_of(y)
    factor, rank = (result.cpu() for result in op(gram.to(device), norms.to(device), RTOL))
    plain, plain_rank = reference.gram_factor(gram, norms, RTOL)
    assert rank.tolist() == plain_rank.tolist() == expected
    assert factor.dtype == torch.float64 and rank.dtype == torch.int64
    k = gram.shape[-1]
    assert factor.isfinite().all()
    assert identity_error(factor, rank, gram) <= 2 * identity_error(plain, plain_rank, gram) + residual_floor(k)
    beyond = torch.arange(k) >= rank[..., None]
    assert not factor.mT[beyond].any()
    assert ((factor != 0).any(-1).sum(-1) == rank).all()


def check_what_is_dependent(op, device: str = "cpu") -> None:
    """Columns with residual s of norms 1: taken down to s = rtol, and not below; a column's own norm is what counts."""
    base = torch.linalg.qr(gaussian(20, 9))[0]
    residual = torch.tensor([1e-2, 1.01e-4, 0.99e-4, 1e-6], dtype=torch.float64)
    y = torch.cat([base[:, :4], base[:, :4] + residual * base[:, 4:8]], 1)
    gram, norms = (x.to(device) for x in gram_of(y))
    factor, rank = op(gram, norms, 1e-4)
    assert rank.item() == 6
    assert (factor != 0).any(1).tolist() == [True] * 6 + [False] * 2
    assert op(gram, norms, 1e-3)[1].item() == 5
    assert op(gram, norms * 1e4**2, 1e-3)[1].item() == 0


def check_columns_that_are_not_finite(op, device: str = "cpu") -> None:
    """They are dependent, and change nothing for the others."""
    y = gaussian(30, 8)
    kept, _ = op(*(x.to(device) for x in gram_of(y[:, [0, 2, 3, 5, 6, 7]])), RTOL)
    y[3, 1], y[5, 4] = float("nan"), float("inf")
    gram, norms = (x.to(device) for x in gram_of(y))
    factor, rank = op(gram, norms, RTOL)
    assert rank.item() == 6
    assert not factor[[1, 4]].any()
    torch.testing.assert_close(factor[[0, 2, 3, 5, 6, 7], :6], kept, rtol=1e-12, atol=1e-14)


def check_order(op, device: str = "cpu") -> None:
    """Columns that are nearly orthonormal keep their order, so that a basis is left as it is."""
    y = torch.linalg.qr(gaussian(60, 20))[0] * (1 + 0.01 * gaussian(20))
    gram, _ = gram_of(y)
    factor, _ = op(gram.to(device), torch.ones(20, dtype=torch.float64, device=device), RTOL)
    assert not factor.tril(-1).any()
    torch.testing.assert_close(factor.diagonal().cpu(), gram.diagonal().rsqrt())
