"""Projection in place, out of a subspace and onto it, without a temporary of the size of what is projected."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .precision import full_precision

#: Entries of bfloat16 or float16 that are held in float32 at a time: on the CPU, where a slice should stay in the
#: cache, and elsewhere, where each slice costs four launches (256 MB).
CHUNK = 1 << 22
DEVICE_CHUNK = 1 << 26


def remove_(y: Tensor, basis: Tensor) -> Tensor:
    """y -= basis basisᵀ y in place, for y of shape (batch, n, k) and a basis of shape (batch, n, r)."""
    return y.baddbmm_(basis, basis.mT @ y, alpha=-1)


def project_out_(x: Tensor, basis: Tensor) -> None:
    """:func:`sparse_cl.linalg.project_out_` on checked arguments."""

    def subtract(part: Tensor, coefficients: Tensor, basis: Tensor) -> None:
        product = part.addmm_ if part.dim() == 2 else part.baddbmm_
        product(coefficients, basis.mT, alpha=-1)

    with full_precision(x.device):
        _project(x, basis, subtract)


def project_onto_(x: Tensor, basis: Tensor) -> None:
    """:func:`sparse_cl.linalg.project_onto_` on checked arguments."""

    def replace(part: Tensor, coefficients: Tensor, basis: Tensor) -> None:
        torch.matmul(coefficients, basis.mT, out=part)

    with full_precision(x.device):
        _project(x, basis, replace)


def _project(x: Tensor, basis: Tensor, write: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    """Calls ``write(part, part basis, basis)`` on parts of x that are one matrix or a contiguous batch of them."""
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
            _project(part, its_basis, write)
    elif x.dtype == basis.dtype:
        write(x, x @ basis, basis)
    else:
        chunk = CHUNK if x.device.type == "cpu" else DEVICE_CHUNK
        for rows in x.split(max(1, chunk // x.shape[1])):
            wide = rows.to(basis.dtype)
            write(wide, wide @ basis, basis)
            rows.copy_(wide)
