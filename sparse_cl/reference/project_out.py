"""Projection in place, out of a subspace and onto it, without a temporary of the size of what is projected."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_cl.reference.precision import full_precision

#: Entries that are held at a time besides the coefficients.
CHUNK = 1 << 22


def remove_(y: Tensor, basis: Tensor) -> Tensor:
    """y (..., n, k) -= basis basisᵀ y in place, basis (..., n, r)."""
    coefficients = basis.mT @ y
    if y.dim() == 2:
        return y.addmm_(basis, coefficients, alpha=-1)
    batch = y.shape[:-2]
    bases = basis.expand(*batch, *basis.shape[-2:]).flatten(0, -3)
    y.flatten(0, -3).baddbmm_(bases, coefficients.flatten(0, -3), alpha=-1)
    return y


def project_out_(x: Tensor, basis: Tensor) -> None:
    """:func:`sparse_cl.linalg.project_out_` on checked arguments."""
    with full_precision(x.device):
        _each_matrix(x, basis, _out)


def project_onto_(x: Tensor, basis: Tensor) -> None:
    """:func:`sparse_cl.linalg.project_onto_` on checked arguments."""
    with full_precision(x.device):
        _each_matrix(x, basis, _onto)


def _out(x: Tensor, coefficients: Tensor, basis: Tensor) -> None:
    x.addmm_(coefficients, basis.mT, alpha=-1)


def _onto(x: Tensor, coefficients: Tensor, basis: Tensor) -> None:
    torch.mm(coefficients, basis.mT, out=x)


def _each_matrix(x: Tensor, basis: Tensor, write) -> None:
    if x.numel() == 0:
        return
    if x.dim() > 2:
        if basis.dim() == 2 and x.is_contiguous():
            return _each_matrix(x.view(-1, x.shape[-1]), basis, write)
        bases = basis if basis.dim() == x.dim() else [basis] * x.shape[0]
        for part, its_basis in zip(x, bases, strict=True):
            _each_matrix(part, its_basis, write)
        return
    if x.dtype == basis.dtype:
        write(x, x @ basis, basis)
        return
    for rows in x.split(max(1, CHUNK // x.shape[1])):
        wide = rows.to(basis.dtype)
        write(wide, wide @ basis, basis)
        rows.copy_(wide)
