"""How much of one subspace lies in another."""

from __future__ import annotations

import torch
from torch import Tensor


def principal_angles(u: Tensor, v: Tensor) -> Tensor:
    """The principal angles between the spans of u and v, in radians, smallest first.

    From their cosines and their sines, so that small ones are exact too (Björck & Golub 1973, Knyazev & Argentati
    2002).

    Args:
        u: (n, k), orthonormal columns.
        v: (n, l), orthonormal columns.

    Returns:
        (min(k, l),) float64, in [0, π/2].

    Raises:
        ValueError: not two matrices with as many rows.
    """
    if u.dim() != 2 or v.dim() != 2 or u.shape[0] != v.shape[0]:
        raise ValueError(
            f"u, v: expected two bases (n, k) and (n, l) of one space, got shapes {tuple(u.shape)} and {tuple(v.shape)}"
        )
    if u.shape[1] > v.shape[1]:
        u, v = v, u
    u, v = u.double(), v.double().to(u.device)
    product = v.mT @ u
    cosines = torch.linalg.svdvals(product)
    sines = torch.linalg.svdvals(u - v @ product).flip(0)
    return torch.atan2(sines, cosines)


def subspace_overlap(u: Tensor, v: Tensor) -> float:
    """‖UᵀV‖²_F / min(k, l): mean squared cosine of the principal angles.

    1 where the smaller span lies in the larger, 0 where they are orthogonal. Of a random span of k dimensions and any
    of l >= k it is l/n on average, which is the null to print with it.

    Args:
        u, v: as for :func:`principal_angles`.
    """
    angles = principal_angles(u, v)
    return float(angles.cos().square().mean()) if len(angles) else 0.0
