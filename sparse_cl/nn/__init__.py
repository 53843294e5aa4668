"""Layers whose backward costs what their active part costs."""

from sparse_cl.nn.activation import activate, restore, write_back
from sparse_cl.nn.active_linear import ActiveLinear

__all__ = ["ActiveLinear", "activate", "restore", "write_back"]
