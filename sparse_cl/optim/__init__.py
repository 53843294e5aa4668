"""Optimizers that confine each update to the room that is free, and the projections that they take."""

from .curvature_projection import CurvatureProjection
from .elastic_pull import ElasticPull
from .low_rank_pull import LowRankPull
from .projected_adamw import ProjectedAdamW
from .projection import Projection
from .sparse_masked_adamw import SparseMaskedAdamW
from .subspace_projected_adamw import SubspaceProjectedAdamW
from .subspace_projection import SubspaceProjection

__all__ = [
    "CurvatureProjection",
    "ElasticPull",
    "LowRankPull",
    "ProjectedAdamW",
    "Projection",
    "SparseMaskedAdamW",
    "SubspaceProjectedAdamW",
    "SubspaceProjection",
]
