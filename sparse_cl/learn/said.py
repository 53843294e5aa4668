"""What a call says of what is protected, and of how far it moved."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from sparse_cl.methods import METHODS, Method
from sparse_cl.methods.carried import Carried
from sparse_cl.methods.memory_method import MemoryMethod


def say_protected(method: Method, carried: Carried, say: Callable[[str], object]) -> None:
    """How many layers and directions are protected, and whose."""
    learned = [entry["name"] for entry in carried.domains]
    memory = carried.memory
    if memory is None or not memory.domains:
        done = f" (it learned {', '.join(learned)} by a method that remembers nothing)" if learned else ""
        say(f"Protected: nothing{done}")
        return
    kept = [entry["name"] for entry in carried.domains if _remembers(entry)]
    whose = ", ".join([*["the base model"] * (memory.domains > len(kept)), *kept])
    if forgotten := [name for name in learned if name not in kept]:
        whose += f" (not {', '.join(forgotten)}, learned by a method that remembers nothing)"
    if getattr(method, "memory", None) is None:
        say(f"Protected: nothing, as {method.name} has no use for what is remembered of {whose}")
        return
    capacity = memory.capacity()
    used, width = (sum(layer[key] for layer in capacity.values()) for key in ("used", "width"))
    subspaces = [found for name in memory.names if (found := memory.subspace(name)) is not None]
    shares = [float(s.values.sum()) / max(float(s.values.sum()) + s.outside, 1e-30) for s in subspaces]
    say(
        f"Protected: {whose}; {len(subspaces)} layers, {used:,} of {width:,} directions of their inputs, which hold "
        f"{median(shares):.0%} of the inputs' energy (median of the layers)"
    )


def _remembers(entry: dict[str, Any]) -> bool:
    method = METHODS.get(entry.get("method", ""))
    return method is None or issubclass(method, MemoryMethod)


def say_moved(method: Method, say: Callable[[str], object]) -> None:
    """How far what layers compute for earlier domains moved."""
    moved = getattr(method, "moved", {})
    if not moved:
        return
    worst = max(moved, key=lambda name: moved[name])
    say(
        f"Earlier domains: a layer's outputs moved by {_share(median(moved.values()))} of their energy (median "
        f"of {len(moved)} layers), at most {_share(moved[worst])} ({worst})"
    )


def _share(value: float) -> str:
    return f"{value:.2%}" if value >= 1e-4 or not value else "less than 0.01%"
