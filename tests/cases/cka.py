"""Debiased linear CKA with the kernels stored, and features to give it."""

from __future__ import annotations

import torch


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hsic_of_kernels(x, y):
    """Song et al. 2012, equation 5, with the n x n kernels."""
    n = len(x)
    k, lab = (v @ v.mT for v in (x, y))
    k, lab = k - k.diag().diag(), lab - lab.diag().diag()
    one = torch.ones(n, dtype=torch.float64)
    total = (k @ lab).trace() + (one @ k @ one) * (one @ lab @ one) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (one @ k @ lab @ one)) / (n * (n - 3))


def cka_of_kernels(x, y):
    return (hsic_of_kernels(x, y) / (hsic_of_kernels(x, x) * hsic_of_kernels(y, y)).sqrt()).item()
