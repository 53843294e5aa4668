"""Singular value decomposition of low rank, by a random sketch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_cl.reference.orthonormalize import orthonormalize
from sparse_cl.reference.precision import full_precision


def randomized_svd(
    a: Tensor,
    test_matrix: Tensor,
    rank: int,
    power_iterations: int,
    orthonormalize: Callable[[Tensor], tuple[Tensor, Tensor]] = orthonormalize,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`sparse_cl.linalg.randomized_svd` of float32 or float64 matrices, on a given (n, l) test matrix."""
    with full_precision(a.device):
        q, _ = orthonormalize(a @ test_matrix)
        for _ in range(power_iterations):
            v, _ = orthonormalize(a.mT @ q)
            q, _ = orthonormalize(a @ v)
        # The orthonormal range of the last product makes the core square, and its SVD independent of m and n.
        b = a.mT @ q
        v, _ = orthonormalize(b)
        left, s, right = torch.linalg.svd(b.mT.double() @ v.double())
        left, s, right = left[..., :, :rank], s[..., :rank], right[..., :rank, :]
        resolved = s > 8 * torch.finfo(a.dtype).eps * s[..., :1]
        u = q @ (left * resolved[..., None, :]).to(a.dtype)
        vh = (right * resolved[..., :, None]).to(a.dtype) @ v.mT
        return u, (s * resolved).to(a.dtype), vh
