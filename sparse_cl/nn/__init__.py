"""Layers of which a part learns: linear layers with active rows or columns, and with branches that tokens choose."""

from .activation import activate, restore, write_back
from .active_linear import ActiveLinear
from .routed_linear import RoutedLinear, load_routed, route, routed_layers, save_routed, unroute

__all__ = [
    "ActiveLinear",
    "RoutedLinear",
    "activate",
    "load_routed",
    "restore",
    "route",
    "routed_layers",
    "save_routed",
    "unroute",
    "write_back",
]
