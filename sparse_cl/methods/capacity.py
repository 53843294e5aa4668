"""What is used and what is left of each layer, as the methods that protect subspaces report it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCARCE = 0.1
"""A layer in which a smaller share than this of a new domain's gradient survives can learn little of that domain."""

Layers = Mapping[str, Mapping[str, Any]]
"""Layer → `width` (input directions), `used` and `free` of them once the domain is learned (ints); `surviving`, the
share of the energy of the domain's gradient, before it is learned, that lies outside the basis in force; `leak`, the
share of the energy of the layer's change over the domain that lies inside that basis (None where there was none)."""


def scarcity(layers: Layers) -> str | None:
    """A sentence on the layers in which less than `SCARCE` of the gradient survives; None where there is no such."""
    scarce = [name for name, layer in layers.items() if layer["surviving"] < SCARCE]
    if not scarce:
        return None
    worst = min(scarce, key=lambda name: layers[name]["surviving"])
    return (
        f"less than {SCARCE:.0%} of the new domain's gradient survives the projection in {len(scarce)} of "
        f"{len(layers)} layers; the least, {layers[worst]['surviving']:.2%}, in {worst}"
    )
