"""What a model writes, whatever its checkpoint asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def generating_by(model: nn.Module, **settings: Any) -> Iterator[None]:
    """`generate` follows these settings of `GenerationConfig`, and takes nothing from the checkpoint's.

    What it is not told it would take from there: beams, penalties, stop words.
    """
    import transformers

    owners: list[Any] = [part for part in model.modules() if hasattr(part, "generation_config")]
    kept = [part.generation_config for part in owners]
    try:
        for part in owners:
            part.generation_config = transformers.GenerationConfig(**settings)
        yield
    finally:
        for part, config in zip(owners, kept, strict=True):
            part.generation_config = config
