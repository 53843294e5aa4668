"""Subspaces: the directions that earlier domains use, and which new updates keep out of."""

from sparse_cl.subspace.memory import SubspaceMemory
from sparse_cl.subspace.subspace import Subspace

__all__ = ["Subspace", "SubspaceMemory"]
