"""Singular value decomposition of low rank, by a random sketch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .orthonormalize import orthonormalize
from .precision import full_precision


def randomized_svd(
    a: Tensor,
    test_matrix: Tensor,
    rank: int,
    power_iterations: int,
    orthonormalize: Callable[..., tuple[Tensor, Tensor]] = orthonormalize,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`sparse_cl.linalg.randomized_svd` of float32 or float64 matrices, on a given (n, l) test matrix."""
    with full_precision(a.device):
        q, _ = orthonormalize(a @ test_matrix)
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
