"""Optimizers that update only what is free: fine-tune one language model on domain after domain."""

from sparse_cl.info import build_info
from sparse_cl.linalg import orthonormalize, project_out_, randomized_svd
from sparse_cl.masks import ColumnMask, ElementMask, RowMask, TwoFourMask, load_masks, save_masks
from sparse_cl.optim import (
    CurvatureProjection,
    DriftBudget,
    ElasticAdamW,
    LowRankPull,
    ProjectedAdamW,
    SparseMaskedAdamW,
    SubspaceProjectedAdamW,
    SubspaceProjection,
    protect,
)
from sparse_cl.subspace import Kronecker, Subspace, SubspaceMemory

__all__ = [
    "ColumnMask",
    "CurvatureProjection",
    "DriftBudget",
    "ElasticAdamW",
    "ElementMask",
    "Kronecker",
    "LowRankPull",
    "ProjectedAdamW",
    "RowMask",
    "SparseMaskedAdamW",
    "Subspace",
    "SubspaceMemory",
    "SubspaceProjectedAdamW",
    "SubspaceProjection",
    "TwoFourMask",
    "build_info",
    "load_masks",
    "orthonormalize",
    "project_out_",
    "protect",
    "randomized_svd",
    "save_masks",
]
__version__ = "0.2.0.dev0"
