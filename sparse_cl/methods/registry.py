"""Every method by the name that `--method` takes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from .base import Method

METHODS: dict[str, type[Method]] = {}
"""Name → class, in the order in which they registered."""
ARENA = "benchmarks.arena"
ELSEWHERE = "more baselines and the bounds are in benchmarks/arena of a checkout of sparse_cl, and register themselves"
"""Where the methods are that an installed package does not have."""


def register(method: type[Method]) -> type[Method]:
    """Makes a method known by its `name`, with its `default_lr`; a class decorator.

    Raises:
        ValueError: another method has this name.
    """
    if METHODS.setdefault(method.name, method) is not method:
        raise ValueError(
            f"{method.__qualname__}.name: {method.name!r} is the name of {METHODS[method.name].__qualname__}"
        )
    return method


def method_named(name: str, *others: str) -> type[Method]:
    """The method of a name.

    Args:
        others: words that would do as well, for the message.

    Raises:
        ValueError: no method has this name; those that exist are named, and where others are.
    """
    if name in METHODS:
        return METHODS[name]
    words = f"; or {', '.join(others)}" if others else ""
    raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}{words}{elsewhere()}")


def elsewhere() -> str:
    """The end of a message that says where the arena's methods are; empty where they are registered."""
    return "" if ARENA in sys.modules else f" ({ELSEWHERE})"


def join_arena() -> None:
    """Has the arena's methods register themselves, where the package runs from a checkout."""
    root = Path(__file__).parents[2]
    if (root / "benchmarks" / "arena" / "__init__.py").is_file():
        if str(root) not in sys.path:
            sys.path.append(str(root))
        importlib.import_module(ARENA)
