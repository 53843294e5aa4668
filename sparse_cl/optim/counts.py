"""Step counts as checkpoints have them: the same keys and shapes whatever a parameter's history.

A state's ``step`` is a table of counts where its entries differ, and its ``cohort`` says which of them each has.
In a checkpoint ``step`` is one number, the largest, and ``counts`` are bytes, which are stored whatever their length:
:data:`SAME` where all entries have that count. Else they are, compressed by zlib, how many counts there are (2 bytes),
the counts (4 bytes each) and the cohorts (1 byte per unit, or per entry). All numbers are little-endian.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from sparse_cl.layout import MAX_COHORTS

NAME = "counts"

#: Not empty, since torch.load(weights_only=True) refuses empty bytes.
SAME = b"same"


def packed(entries: Mapping[str, Any]) -> dict[str, Any]:
    """A state's entries with ``counts``, and one number as ``step``, in place of ``step`` and ``cohort``."""
    result = {name: value for name, value in entries.items() if name != "cohort"}
    if "step" not in entries:
        return result
    step, cohort = entries["step"], entries.get("cohort")
    result["step"], result[NAME] = step.max() if step.dim() else step, SAME
    if cohort is not None and step.numel() > 1:
        table = step.cpu().numpy().astype("<i4")
        raw = len(table).to_bytes(2, "little") + table.tobytes() + cohort.cpu().numpy().tobytes()
        result[NAME] = zlib.compress(raw, 1)
    return result


def unpacked(entries: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's entries with ``step`` and ``cohort`` in place of ``counts``, a flat one; others as they are.

    Raises:
        ValueError: ``counts`` are not what :func:`packed` wrote.
    """
    result = {name: value for name, value in entries.items() if name != NAME}
    counts = entries.get(NAME, SAME)
    if not isinstance(counts, bytes):
        raise ValueError(f"{NAME}: expected bytes, got {type(counts).__name__}")
    if counts != SAME:
        try:
            raw = zlib.decompress(counts)
        except zlib.error as error:
            raise ValueError(f"{NAME}: not readable ({error}); load a checkpoint that is whole") from None
        number = int.from_bytes(raw[:2], "little")
        start = 2 + 4 * number
        if not 1 <= number <= MAX_COHORTS or len(raw) < start:
            raise ValueError(
                f"{NAME}: expected 1 to {MAX_COHORTS} counts of 4 bytes each, got {len(raw)} bytes for {number}"
            )
        result["step"] = torch.from_numpy(np.frombuffer(raw, "<i4", number, 2).astype(np.int32))
        result["cohort"] = torch.from_numpy(np.frombuffer(raw, np.uint8, -1, start).copy())
    return result
