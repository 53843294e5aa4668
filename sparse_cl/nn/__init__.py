"""Layers whose backward costs what their active part costs."""

from .activation import activate, restore, write_back
from .active_linear import ActiveLinear

__all__ = ["ActiveLinear", "activate", "restore", "write_back"]
