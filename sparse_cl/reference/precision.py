"""Matrix products in the precision of their operands, whatever the caller allows elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

_REDUCED = ("tf32", "bf16")


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Turns autocast, TF32 and bf16 products of float32 matrices off, and sets them back as they were."""
    cuda, onednn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = cuda.fp32_precision, onednn.fp32_precision
    known = torch.amp.is_autocast_available(device.type)  # it is not of the meta device
    with torch.autocast(device.type, enabled=False) if known else nullcontext():
        if not any(precision in _REDUCED for precision in before):
            yield
            return
        try:
            legacy = torch.get_float32_matmul_precision()
        except RuntimeError:  # the caller has used torch.backends alone, which leaves the older setting at its default
            legacy = "highest"
        try:
            # Sets both kinds of setting: torch refuses to read one while the other says something else.
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(legacy)
            cuda.fp32_precision, onednn.fp32_precision = before
