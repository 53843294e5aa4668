"""The studies by name: what is run in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparse_cl.four_domains.settings import GIVEN, REVERSE, Settings

from .grid import over

ORDERS, SEEDS = (GIVEN, REVERSE), (0, 1, 2)


def routed(models: Path, data: Path) -> dict[str, Settings]:
    """Routing by token and its controls, over rates; beside them AdamW of all weights."""
    variants: dict[str, dict[str, Any]] = {
        "top": {},
        "mask": {"routing": "none", "open": 0.1},
        "none": {"routing": "none"},
        "random": {"routing": "random"},
    }
    points = {
        f"{name}-{lr:g}": {"method": "routed", "lr": lr, "options": options}
        for lr in (4e-3, 1.5e-3, 5e-4)
        for name, options in variants.items()
    } | {f"adamw-{lr:g}": {"method": "adamw", "lr": lr} for lr in (4e-4, 2e-4, 1e-4)}
    return over(_base_5m(models, data), ORDERS, SEEDS, points)


_WAKING: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "renew": {"wake": 0.1},
    "renew-more": {"wake": 0.3},
    "renew-boost": {"wake": 0.1, "boost": 3.0},
    "boost": {"wake": 0.1, "boost": 3.0, "renew": False},
}


def waking_choice(models: Path, data: Path) -> dict[str, Settings]:
    """Which way of waking neurons: selective write on validation records, 15 steps a domain."""
    points = {name: {"method": "selective-write", "lr": 1e-3, "options": options} for name, options in _WAKING.items()}
    return over(_base_5m(models, data, split="validation", steps=15), (GIVEN,), (0,), points)


def waking(models: Path, data: Path) -> dict[str, Settings]:
    """Selective write with and without waking, and elastic, on test records."""
    points = {
        f"selective-{name}": {"method": "selective-write", "lr": 1e-3, "options": _WAKING[name]}
        for name in ("plain", "renew", "boost")
    } | {"elastic": {"method": "elastic", "lr": 1e-3, "options": {"strength": 50.0}}}
    return over(_base_5m(models, data), ORDERS, SEEDS[:2], points)


STUDIES: Mapping[str, Callable[[Path, Path], dict[str, Settings]]] = {
    "routed": routed,
    "waking-choice": waking_choice,
    "waking": waking,
}


def _base_5m(models: Path, data: Path, **others: Any) -> Settings:
    """Runs of 30 steps of four records a domain, scored in bits per byte of test records."""
    settings: dict[str, Any] = {
        "model": str(models / "base-5m"),
        "data": str(data),
        "steps": 30,
        "batch_size": 4,
        "eval_records": 32,
        "metrics": ("bits_per_byte",),
    }
    return Settings(**{**settings, **others})
