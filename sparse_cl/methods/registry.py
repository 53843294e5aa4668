"""Every method by the name that `--method` takes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from .base import Method

METHODS: dict[str, type[Method]] = {}
"""Name → class, in the order in which they registered."""
ELSEWHERE = "more baselines are in benchmarks/arena of a checkout of sparse_cl, and register themselves there"


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


def join_arena() -> None:
    """Has the arena's methods register themselves, where the package runs from a checkout."""
    root = Path(__file__).parents[2]
    if (root / "benchmarks" / "arena" / "__init__.py").is_file():
        if str(root) not in sys.path:
            sys.path.append(str(root))
        importlib.import_module("benchmarks.arena")
