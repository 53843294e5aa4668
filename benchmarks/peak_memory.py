"""How much memory a call takes at its peak, beyond what is held before it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_mib(call: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """MiB at the peak of ``call`` over those before it: allocated ones of a GPU, else resident ones.

    Resident memory is known on Linux only; elsewhere this is NaN. What the allocator has kept from before is not seen;
    it gives back what is larger than 32 MiB.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not _RESET.exists():
        call()
        return float("nan")
    gc.collect()
    _RESET.write_text("5")  # sets the high-water mark to what is resident now
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return max(0.0, (peak - before) / 1024)


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])
