"""Layers with known spectra, and the oracle that keeps every gradient: what subspace memories are held against."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def orthogonal(n: int, seed: int = 0) -> Tensor:
    """A random (n, n) orthogonal matrix, float64."""
    rng = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64)).Q


def with_gap(n: int, rank: int, decay: float = 0.9) -> Tensor:
    """(n,): ``rank`` scales from 1 down to 1/2, then a gap of ten, then a geometric tail."""
    i = torch.arange(n, dtype=torch.float64)
    return torch.where(i < rank, 1 - 0.5 * i / max(1, rank - 1), 0.05 * decay ** (i - rank))


def gradients(scales: Tensor, rows: int, steps: int, seed: int = 0, directions: Tensor | None = None) -> list[Tensor]:
    """(rows, n) float64 matrices whose rows have these scales along the columns of ``directions``."""
    rng = torch.Generator().manual_seed(seed)
    n = scales.numel()
    directions = orthogonal(n, seed) if directions is None else directions
    draw = [torch.randn(rows, n, generator=rng, dtype=torch.float64) for _ in range(steps)]
    return [(x * scales) @ directions.mT for x in draw]


class Oracle:
    """The memory's rule by singular value decompositions in float64, of all gradients of a domain at once.

    Of A = U diag(λ) Uᵀ + w E[x xᵀ] the fewest directions that leave out no more than (1 - energy) of the domain: with a
    cap the leading eigenvectors, without one the old directions and the leading ones outside them (GPM).
    """

    def __init__(self, n: int, energy: float, max_rank: int | None = None):
        self.basis, self.values = torch.zeros(n, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        self.energy, self.max_rank = energy, max_rank

    def learn(self, seen: list[Tensor], weight: float = 1.0, fade: float = 1.0) -> int:
        """Ends a domain with these gradients; how many directions there are more."""
        rows, before = torch.cat(seen).double(), len(self.values)
        rows = rows * (weight / len(rows)) ** 0.5
        old = (self.basis * (fade * self.values).sqrt()).mT
        if self.max_rank is None:
            count = self.further([rows])
            rest = rows - rows @ self.basis @ self.basis.mT
            new = torch.linalg.svd(rest, full_matrices=False).Vh[:count].mT
            span = torch.linalg.qr(torch.cat([self.basis, new], 1)).Q
            _, roots, vh = torch.linalg.svd(torch.cat([old, rows]) @ span, full_matrices=False)
            self.basis, self.values = span @ vh.mT, roots.square()
            return count
        both = torch.cat([old, rows])
        _, roots, vh = torch.linalg.svd(both, full_matrices=False)
        values, total = roots.square(), both.square().sum()
        wanted = self.energy * rows.square().sum() + fade * self.values.sum()
        # Energies are compared where rounding cannot decide.
        count = min(int((values.cumsum(0) < wanted - 1e-12 * total).sum()) + 1, self.max_rank)
        count = min(count, int((values > 1e-7 * total).sum()))
        self.basis, self.values = vh[:count].mT, values[:count]
        return count - before

    def further(self, seen: list[Tensor]) -> int:
        """How many directions it takes to explain these gradients as well, beside those that are known."""
        rows = torch.cat(seen).double()
        rest = torch.linalg.svdvals(rows - rows @ self.basis @ self.basis.mT).square()
        missing = rest.sum() - (1 - self.energy + 1e-12) * rows.square().sum()
        return int(((rest.cumsum(0) - rest < missing) & (rest > 1e-7 * rows.square().sum())).sum())


def largest_angle(a: Tensor, b: Tensor) -> float:
    """Sine of the largest principal angle from the smaller to the larger of two spans."""
    small, large = sorted((a.double(), b.double()), key=lambda x: x.shape[1])
    if small.shape[1] == 0:
        return 0.0
    return float(torch.linalg.matrix_norm(small - large @ (large.mT @ small), 2))


def weight(rows: int, n: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A weight of zeros: only its gradient matters to a memory."""
    return nn.Parameter(torch.zeros(rows, n, dtype=dtype))


def observe_all(memory, param: nn.Parameter, seen: list[Tensor]) -> None:
    """Observes each of these gradients."""
    for gradient in seen:
        param.grad = gradient.to(param.dtype)
        memory.observe()
