"""What a probe gives back: a frozen dataclass, which is also plain JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Result:
    """Base of the dataclasses that hold results; the record in `results.json` is their fields by name."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: the fields by name, tensors as nested lists, NaN as None."""
        return {one.name: plain(getattr(self, one.name)) for one in fields(self) if "apart" not in one.metadata}


def apart() -> Any:
    """A field that is not in the JSON, since it is large, or since `to_json` puts it elsewhere."""
    return field(metadata={"apart": True})


def plain(value: Any) -> Any:
    """A value as JSON holds it."""
    if isinstance(value, Result):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if value != value else value
