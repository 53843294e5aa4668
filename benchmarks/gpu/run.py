"""What all phases of gpu.sh share: the device, its clock, the time that is left, and the JSON file they write into.

The file holds one object a phase, {case: {"status", "seconds", "commit", "device", figures}}. It is replaced after
every case, so that a run that is killed loses one. A case that passed is not run again.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
ROOT = Path(__file__).resolve().parents[2]

#: Exit codes of a phase: a case failed; none failed, but time did not reach for all.
FAILED, NOT_REACHED = 1, 3


class Skipped(Exception):
    """A case that cannot run here; says why."""


class Run:
    """The cases of one phase, in the file at ``path``.

    Args:
        deadline: seconds since the epoch after which no case starts.
        tiny: sizes that take no time.
    """

    def __init__(self, phase: str, path: Path, deadline: float = float("inf"), tiny: bool = False):
        self.phase, self.path, self.deadline, self.tiny = phase, path, deadline, tiny
        self.data = json.loads(path.read_text()) if path.exists() else {}

        self.failed, self.not_reached = [], []
        self._lock = threading.Lock()

    @property
    def device(self) -> str:
        return self.data.get("versions", {}).get("device") or device_name()

    @property
    def cases(self) -> dict[str, dict]:
        return self.data.setdefault(self.phase, {})

    def case(self, name: str, measure: Callable[[], dict], needs: float = 0.0, **same) -> dict | None:
        """Runs and records a case; returns what the file has of it, None where time did not reach.

        Args:
            measure: returns the figures. What it raises is recorded as the case's failure, :class:`Skipped` as a skip.
            needs: seconds that must be left.
            same: what an earlier result must agree in to count; recorded, too.
        """
        known = self.cases.get(name, {})
        if known.get("status") == "passed" and all(known.get(key) == value for key, value in same.items()):
            print(f"{self.phase}: {name}: as in the earlier run", flush=True)
            return known
        if time.time() + (0 if self.tiny else needs) >= self.deadline:
            self.not_reached.append(name)
            return None
        start = time.time()
        try:
            found = {"status": "passed", **measure()}
        except Skipped as reason:
            found = {"status": "skipped", "reason": str(reason)}
        except Exception as error:
            traceback.print_exc(limit=-4)
            found = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
        # Out here, where the exception no longer holds the tensors of the frames that it left.
        free()
        found |= {"device": self.device, "commit": commit(), **same, "seconds": round(time.time() - start, 2)}
        with self._lock:
            if found["status"] == "failed":
                self.failed.append(name)
            self.cases[name] = found
            write(self.path, self.data)
        print(f"{self.phase}: {name}: {said(found)}", flush=True)
        return found

    def finish(self) -> int:
        """Names what was not reached, in the file too; returns an exit code."""
        self.data.setdefault("not_reached", []).extend(f"{self.phase}: {name}" for name in self.not_reached)
        write(self.path, self.data)
        return FAILED if self.failed else NOT_REACHED if self.not_reached else 0


def said(found: dict) -> str:
    """A case in one line."""
    hidden = ("status", "device", "commit", "versions")
    shown = {key: value for key, value in found.items() if key not in hidden}
    text = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
    return f"{found['status']}  {text}"[:600]


def write(path: Path, data: dict) -> None:
    """Replaces the file at once, so that it is whole whenever the process ends."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(partial, path)


def main(phase: str, doc: str, cases: Callable[[Run], None]) -> None:
    """The command line of a phase, which exits with the code of its run."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file to write, or to go on with")
    parser.add_argument(
        "--deadline", type=float, default=float("inf"), help="no case starts later (seconds since 1970)"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on the CPU where there is no GPU")
    arguments = parser.parse_args()
    if not (ON_GPU or arguments.tiny):
        raise SystemExit("needs a GPU; --tiny runs anywhere, and measures nothing of interest")
    torch.manual_seed(0)
    if arguments.tiny and not ON_GPU:
        # Threads that wait for one another on a busy machine take longer than all the tiny work.
        torch.set_num_threads(1)
    run = Run(phase, arguments.json, arguments.deadline, arguments.tiny)
    run.data.setdefault("versions", versions())
    cases(run)
    raise SystemExit(run.finish())


def device_name() -> str:
    return torch.cuda.get_device_name() if ON_GPU else f"CPU {platform.processor() or platform.machine()}"


def commit() -> str:
    return os.environ.get("COMMIT") or _output("git", "-C", str(ROOT), "rev-parse", "HEAD") or "unknown"


@cache
def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def versions() -> dict[str, str]:
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if ON_GPU else ""
    return {
        "device": device_name(),
        "driver": driver.partition("\n")[0] or "none",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "commit": commit(),
        "python": platform.python_version(),
    }


def device_bytes() -> int:
    """Memory of the device in all, so that every run on it fits the same sizes."""
    return torch.cuda.get_device_properties(0).total_memory if ON_GPU else 1 << 32


def free() -> None:
    if ON_GPU:
        gc.collect()
        torch.cuda.empty_cache()


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def once_ms(call: Callable[[], object]) -> float:
    """Milliseconds by CUDA events, elsewhere by the clock."""
    if not ON_GPU:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def median_ms(call: Callable[[], object], repeats: int = 15, warmup: int = 3) -> float:
    for _ in range(warmup):
        call()
    return statistics.median(once_ms(call) for _ in range(repeats))


def host_ms(call: Callable[[], object], repeats: int = 100, warmup: int = 10) -> float:
    """Median milliseconds until ``call`` returns, the device idle before."""
    times = []
    for _ in range(repeats + warmup):
        synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[warmup:])


if __name__ == "__main__":
    from cases.adamw import kinds, make_problem

    from sparse_cl import ops

    # On the CPU, which tells libraries of other schemas that load all the same from a kernel that fails.
    make_problem(kinds()).step(ops.masked_adamw_)
    print(json.dumps({**versions(), "libraries": ops.LOADED}))
