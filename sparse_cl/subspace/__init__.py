"""Subspaces: the directions that earlier domains use, and which new updates keep out of."""

from .kronecker import Kronecker, threshold_of
from .memory import SubspaceMemory
from .subspace import Subspace
from .tables import UsedRows

__all__ = ["Kronecker", "Subspace", "SubspaceMemory", "UsedRows", "threshold_of"]
