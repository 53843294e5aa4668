"""How far features share directions because there are more of them than dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_cl.models.parts import find_mlps, matrix_of

from .result import Result


def feature_dimensionality(vectors: Tensor) -> Tensor:
    """D_i = ‖w_i‖² / Σ_j (ŵ_i · w_j)²: the share of a dimension that a feature has to itself (Elhage et al. 2022).

    1 for a vector that is orthogonal to all others, 1/2 for two in one direction of equal length; their sum is at most
    the rank of the vectors.

    Args:
        vectors: (features, width).

    Returns:
        (features,) float64 in [0, 1]; 0 for a vector of zeros.

    Raises:
        ValueError: no matrix, or values that are not finite.
    """
    if vectors.dim() != 2:
        raise ValueError(f"vectors: expected (features, width), got shape {tuple(vectors.shape)}")
    w = vectors.detach().double()
    if not w.isfinite().all():
        raise ValueError("vectors: expected finite values")
    norms = w.norm(dim=1)
    units = w / norms.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    # Σ_j (ŵ_i · w_j)² = ŵ_i A ŵ_iᵀ with A = Σ_j w_j w_jᵀ, without products of all pairs.
    shared = ((units @ (w.mT @ w)) * units).sum(1)
    return torch.where(norms > 0, norms.square() / shared.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def random_dimensionality(vectors: Tensor) -> Tensor:
    """What vectors of these lengths in random directions have: ‖w_i‖² / (‖w_i‖² + Σ_{j≠i} ‖w_j‖² / width).

    The denominator is exact in the mean. Vectors that share directions less than chance have more.

    Args, returns:
        as `feature_dimensionality`.
    """
    squares = vectors.detach().double().square().sum(1)
    others = (squares.sum() - squares) / vectors.shape[1]
    return torch.where(squares > 0, squares / (squares + others).clamp(min=torch.finfo(torch.float64).tiny), 0.0)


@dataclass(frozen=True)
class Superposition(Result):
    """Of one MLP, what its neurons write: the columns of the layer out of them.

    Attributes:
        features: neurons that write anything.
        width: dimensions that they write to.
        mean: mean feature dimensionality of these neurons; at most width / features.
        null: mean of as many vectors of the same lengths in random directions.
        median_overlap: median over neurons of the share of a neuron's direction that others use, 1 - D.
    """

    features: int
    width: int
    mean: float
    null: float
    median_overlap: float


def superposition(model: nn.Module) -> dict[str, Superposition]:
    """`Superposition` of each MLP, by name; compare a model before and after domains.

    Raises:
        ValueError: a model without MLPs, or whose weights are no plain matrices.
    """
    found = {}
    for mlp in find_mlps(model):
        writes = matrix_of(mlp.out, mlp.out_name).mT
        writes = writes[writes.detach().any(1)]
        dimensionality, null = feature_dimensionality(writes), random_dimensionality(writes)
        found[mlp.name] = Superposition(
            features=len(writes),
            width=writes.shape[1],
            mean=float(dimensionality.mean()) if len(writes) else math.nan,
            null=float(null.mean()) if len(writes) else math.nan,
            median_overlap=float(1 - dimensionality.median()) if len(writes) else math.nan,
        )
    return found
