"""Optimizers that confine each update to the room that is free."""

from .sparse_masked_adamw import SparseMaskedAdamW
from .subspace_projected_adamw import SubspaceProjectedAdamW

__all__ = ["SparseMaskedAdamW", "SubspaceProjectedAdamW"]
