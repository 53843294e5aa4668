"""Subspaces: the directions that earlier domains use, and which new updates keep out of."""

from .memory import SubspaceMemory
from .subspace import Subspace

__all__ = ["Subspace", "SubspaceMemory"]
