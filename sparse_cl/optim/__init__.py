"""Optimizers that confine each update to the room that is free, and the projections that they take."""

from .curvature_projection import CurvatureProjection
from .elastic_adamw import ElasticAdamW
from .low_rank import DriftBudget, LowRankPull, SubspaceProjection
from .projected_adamw import ProjectedAdamW
from .projection import Projection
from .protect import Protection, protect
from .sparse_masked_adamw import SparseMaskedAdamW
from .subspace_projected_adamw import SubspaceProjectedAdamW

__all__ = [
    "CurvatureProjection",
    "DriftBudget",
    "ElasticAdamW",
    "LowRankPull",
    "ProjectedAdamW",
    "Projection",
    "Protection",
    "SparseMaskedAdamW",
    "SubspaceProjectedAdamW",
    "SubspaceProjection",
    "protect",
]
