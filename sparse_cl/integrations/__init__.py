"""Continual learning in other people's training: HF Trainer and TRL, Lightning, and a loop of one's own.

`ContinualCallback` needs transformers, `ContinualLightning` needs lightning; each is imported when it is asked for.
"""

from __future__ import annotations

from typing import Any

from .domain import Domain, continual

__all__ = ["ActiveClipping", "ContinualCallback", "ContinualLightning", "Domain", "continual"]


def __getattr__(name: str) -> Any:
    if name in ("ContinualCallback", "ActiveClipping"):
        from . import trainer

        return getattr(trainer, name)
    if name == "ContinualLightning":
        from . import lightning

        return lightning.ContinualLightning
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
