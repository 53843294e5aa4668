"""Ranks of features and of updates, and the ranks of random ones to compare with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .pairing import Weights, paired_matrices
from .result import Result, apart


def effective_rank(singular_values: Tensor) -> Tensor:
    """exp of the entropy of σ / Σσ: 1 where only one value is not zero, k for k equal ones (Roy & Vetterli 2007).

    Args:
        singular_values: (..., k), not negative; any order.

    Returns:
        (...), float64; 0 where all values are 0.

    Raises:
        ValueError: a negative value, or one that is not finite.
    """
    sigma = _checked(singular_values)
    shares = sigma / sigma.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    rank = torch.special.entr(shares).sum(-1).exp()
    return torch.where(sigma.sum(-1) > 0, rank, 0.0)


def stable_rank(singular_values: Tensor) -> Tensor:
    """Σσ² / σ₁² (Rudelson & Vershynin 2007). Arguments, result and errors as for `effective_rank`."""
    sigma = _checked(singular_values)
    if not sigma.shape[-1]:
        return sigma.sum(-1)
    relative = sigma / sigma.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return relative.square().sum(-1)


def ranks_of(singular_values: Tensor) -> tuple[float, float]:
    """Effective and stable rank of one matrix with these singular values (k,)."""
    return effective_rank(singular_values).item(), stable_rank(singular_values).item()


def _checked(singular_values: Tensor) -> Tensor:
    sigma = singular_values.double()
    if not (sigma.isfinite() & (sigma >= 0)).all():
        raise ValueError(
            "singular_values: expected finite values that are not negative, got "
            f"{sigma.min().item():.3g} to {sigma.max().item():.3g}; pass singular values, not eigenvalues"
        )
    return sigma


@lru_cache(maxsize=64)
def gaussian_singular_values(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Singular values of one random matrix of independent standard normal entries, largest first.

    Drawn exactly and without the matrix, from its bidiagonal form (Dumitriu & Edelman 2002, β = 1), so that the number
    of rows costs nothing.

    Returns:
        (min(rows, columns),) float64. Do not write to it: the same call gives the same tensor again.
    """
    small, large = sorted((rows, columns))
    if small < 1:
        raise ValueError(f"rows and columns: expected at least 1 of each, got {rows} and {columns}")
    # numpy, as torch draws no χ² from a generator of its own.
    rng = np.random.default_rng(seed)
    diagonal = torch.from_numpy(rng.chisquare(large - np.arange(small))).sqrt()
    below = torch.from_numpy(rng.chisquare(np.arange(small - 1, 0, -1))).sqrt()
    return torch.linalg.svdvals(diagonal.diag() + below.diag(-1))


def gaussian_ranks(rows: int, columns: int) -> tuple[float, float]:
    """Effective and stable rank of a random Gaussian matrix: what no structure at all gives."""
    return ranks_of(gaussian_singular_values(rows, columns))


@dataclass(frozen=True)
class WeightUpdate(Result):
    """How one weight (m, n) changed.

    Attributes:
        shape: (m, n), as outputs and inputs.
        change: ‖ΔW‖_F / ‖W‖_F; None for a W of zeros.
        effective_rank, stable_rank: of ΔW; 0 for none.
        gaussian_effective_rank, gaussian_stable_rank: of a random ΔW of this shape, the null; the ceiling is min(m, n).
    """

    shape: tuple[int, int]
    change: float | None
    effective_rank: float
    stable_rank: float
    gaussian_effective_rank: float
    gaussian_stable_rank: float


@dataclass(frozen=True)
class UpdateRanks(Result):
    """Result of `update_rank`: `weights` by name, and the singular values of each ΔW, (min(m, n),) float64."""

    weights: dict[str, WeightUpdate]
    singular_values: dict[str, Tensor] = apart()

    def tensors(self) -> dict[str, Tensor]:
        return {f"{name}.update_singular_values": sigma for name, sigma in self.singular_values.items()}


def update_rank(before: Weights, after: Weights, names: Iterable[str] | None = None) -> UpdateRanks:
    """Singular values and ranks of what changed between two checkpoints, ΔW = after − before, a weight at a time.

    Exact, so there is no interval. Values below 1e-8 of the largest are rounding. A weight that is stored rounded hides
    how low the rank was of what was added to it: the rounding is noise of full rank.

    Args:
        before, after: modules, or {name: weight}; matrices are compared, and nothing else.
        names: of the matrices to compare; None: all.

    Raises:
        ValueError: the two differ in structure (the first weight that does is named), or hold no matrix.
    """
    weights, spectra = {}, {}
    for name, old, new in paired_matrices(before, after, names):
        delta = new.double() - old.double()
        sigma = _singular_values(delta)
        norm = torch.linalg.vector_norm(old.double()).item()
        change = torch.linalg.vector_norm(delta).item()
        relative, (rows, columns) = change / norm if norm else None, old.shape
        weights[name] = WeightUpdate((rows, columns), relative, *ranks_of(sigma), *gaussian_ranks(rows, columns))
        spectra[name] = sigma.cpu()
    return UpdateRanks(weights, spectra)


def _singular_values(matrix: Tensor) -> Tensor:
    # By the smaller Gram matrix: an embedding of 150 000 rows costs no more than a layer.
    gram = matrix.mT @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.mT
    values = torch.linalg.eigvalsh(gram).flip(-1).clamp(min=0)
    # Below this, an eigenvalue is rounding error of the largest.
    floor = values[:1] * len(values) * torch.finfo(torch.float64).eps
    return torch.where(values > floor, values, 0.0).sqrt()
