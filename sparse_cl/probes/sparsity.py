"""How few neurons hold how much of a token's L1 mass, and what chance gives."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

LEVELS = (0.9, 0.99)
"""Shares of the L1 mass for which it is counted how many neurons hold them."""

SHARES = tuple(round(x, 6) for x in (0, 0.001, 0.002, 0.005, 0.01, 0.02, *(i / 20 for i in range(1, 21))))
"""Shares of the neurons at which curves are given."""


def ascending(magnitudes: Tensor) -> Tensor:
    """Each row sorted, smallest first. On the CPU by NumPy, which sorts floats some twenty times as fast as torch."""
    if magnitudes.device.type == "cpu":
        return torch.from_numpy(np.sort(magnitudes.numpy(), axis=-1))
    return magnitudes.sort(dim=-1).values


def neurons_needed(ordered: Tensor, totals: Tensor) -> Tensor:
    """(t, levels): how many of each token's neurons, at least, hold each of `LEVELS` of its L1 mass; whole floats.

    Args:
        ordered: (t, neurons), as `ascending` gives it.
        totals: (t, 1), its sums. A token without any mass needs no neuron.
    """
    kept = torch.tensor(LEVELS, dtype=ordered.dtype, device=ordered.device)
    # From the small end, where a running sum in float32 is accurate, and as what may be dropped is defined.
    dropped = torch.searchsorted(ordered.cumsum(1), (1 - kept) * totals, right=True)
    return (ordered.shape[1] - dropped).to(ordered.dtype)


def curve_at(profile: Tensor, shares: tuple[float, ...] = SHARES) -> Tensor:
    """Share of the L1 mass held by the top share of neurons, linear between whole neurons.

    Args:
        profile: (neurons,), the mean share that a token's largest neuron holds, its second largest, and so on.
    """
    width = profile.numel()
    held = torch.cat([profile.new_zeros(1), profile.cumsum(0)])
    position = torch.tensor(shares, dtype=profile.dtype) * width
    below = position.floor().long().clamp(max=width - 1)
    return held[below] + (position - below) * (held[below + 1] - held[below])


def chance_needed(level: float, product: bool) -> float:
    """The share of neurons that holds `level` of the L1 mass where activations are independent Gaussians.

    Args:
        product: of products of two such Gaussians, which are what a GLU at random weights gives.
    """
    shares, masses = _chance(product)
    return float(np.interp(level, masses, shares))


def chance_curve(product: bool, shares: tuple[float, ...] = SHARES) -> list[float]:
    """The curve of `curve_at` for activations as in `chance_needed`."""
    at, masses = _chance(product)
    return np.interp(shares, at, masses).tolist()


@lru_cache
def _chance(product: bool) -> tuple[np.ndarray, np.ndarray]:
    """Shares of neurons above a threshold, and shares of the mass that they hold, both ascending."""
    threshold = torch.logspace(-12, 2, 20_000, base=math.e * math.e, dtype=torch.float64).flip(0)
    if not product:
        share, mass = torch.special.erfc(threshold / math.sqrt(2)), torch.exp(-threshold.square() / 2)
    else:
        # |XY| has the density 2 K0(t) / pi (Craig 1936), so E[|XY|; |XY| > t] = 2 t K1(t) / pi, of 2 / pi in all.
        density = torch.special.modified_bessel_k0(threshold) * threshold
        share = 2 / math.pi * torch.cumulative_trapezoid(density, -threshold.log())
        share = torch.cat([share.new_zeros(1), share])
        mass = threshold * torch.special.modified_bessel_k1(threshold)
    return np.append(share.numpy(), 1.0), np.append(mass.numpy(), 1.0)
