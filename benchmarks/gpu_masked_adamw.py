"""masked_adamw_ on a GPU against torch's fused AdamW, beside the copy bandwidth of the same process.

    python benchmarks/gpu_masked_adamw.py --out results.json

Times are medians of CUDA events around whole steps of Llama-3-8B's parameter list, which is far beyond the L2 cache;
where memory does not hold it, with fewer layers of the same shapes. GB/s counts every byte of the active entries once
a read and once a write; for element masks every 32-byte sector that holds an active entry.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sparse_cl import ColumnMask, ElementMask, RowMask, SparseMaskedAdamW, TwoFourMask, ops
from sparse_cl.layout import DENSE, StateLayout, state_dtype

LR = 1e-3
LAYERS = 32
SECTOR = 32


def llama_shapes(layers: int = LAYERS) -> list[tuple[int, ...]]:
    """Shapes of Llama-3-8B's parameters; 291 tensors at 32 layers."""
    square, narrow, up, down = (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)
    layer = [square, narrow, narrow, square, up, up, down, (4096,), (4096,)]
    return [(128256, 4096), *layer * layers, (4096,), (128256, 4096)]


def layers_that_fit(bytes_per_parameter: float) -> int:
    free, _ = torch.cuda.mem_get_info()

    def needed(layers: int) -> float:
        return bytes_per_parameter * sum(torch.Size(s).numel() for s in llama_shapes(layers))

    return max((n for n in range(1, LAYERS + 1) if needed(n) < 0.85 * free), default=1)


def median_ms(step: Callable[[], None], repeats: int = 15, warmup: int = 3) -> float:
    for _ in range(warmup):
        step()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def host_us(step: Callable[[], None], repeats: int = 200) -> float:
    """Time until ``step`` returns, the GPU idle before."""
    times = []
    for _ in range(repeats + 10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[10:])


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy, bytes read and written."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source)) / 1e6


def mask_for(kind: str, shape: tuple[int, ...], density: float):
    """A random mask, or None for a dense parameter; what a kind cannot mask gets an empty row mask."""
    if kind == "dense":
        return None
    if kind == "rows":
        return RowMask(torch.randperm(shape[0])[: round(density * shape[0])].sort().values, shape).to("cuda")
    if kind == "elements":
        return ElementMask(torch.rand(shape, device="cuda") < density)
    if len(shape) != 2:
        return RowMask([], shape).to("cuda")
    if kind == "columns":
        return ColumnMask(torch.randperm(shape[1])[: round(density * shape[1])].sort().values, shape).to("cuda")
    pair = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]])
    choice = torch.randint(6, (shape[0], shape[1] // 4), device="cuda")
    return TwoFourMask(pair.bool().cuda()[choice].view(shape))


class Ours:
    """One parameter list with masks, stepped by the op alone."""

    def __init__(self, shapes, dtype: torch.dtype, kind: str, density: float = 1.0, master: bool = False):
        self.params = [torch.randn(s, device="cuda", dtype=dtype) for s in shapes]
        self.grads = [torch.randn(s, device="cuda", dtype=dtype) for s in shapes]
        self.states: list[Tensor] = []
        rows, self.bytes, self.entries = [], 0.0, 0
        for param in self.params:
            mask = mask_for(kind, tuple(param.shape), density)
            if mask is None:
                layout = StateLayout(DENSE, tuple(param.shape), param.numel(), state_dtype(dtype), master=master)
            else:
                layout = mask.layout(dtype, master=master)
            buffer, views = layout.allocate(param.device)
            for name, section in mask.sections().items() if mask is not None else ():
                views[name].copy_(section)
            views["exp_avg"].normal_()
            views["exp_avg_sq"].uniform_()
            if master and layout.entries:
                views["master"].normal_()
            self.states.append(buffer)
            rows.append(layout.row())
            self.entries += layout.entries
            self.bytes += self._traffic(layout, param, mask)
        self.layout = torch.tensor(rows, dtype=torch.int64)

    @staticmethod
    def _traffic(layout: StateLayout, param: Tensor, mask) -> float:
        weight, acc = param.element_size(), layout.dtype.itemsize
        state = (6 if layout.master else 4) * acc * layout.entries
        passes = 2 if layout.master else 3  # gradient read, parameter written, and read where there is no master
        touched = layout.entries
        if mask is not None and not isinstance(mask, RowMask):
            per_sector = SECTOR // weight
            if isinstance(mask, ElementMask):
                touched = per_sector * param.numel() / per_sector * (1 - (1 - mask.density) ** per_sector)
            elif isinstance(mask, ColumnMask):
                touched = param.shape[0] * per_sector * (mask.index // per_sector).unique().numel()
            else:
                touched = param.numel()
        index = param.numel() / 8 if isinstance(mask, ElementMask | TwoFourMask) else 0
        return passes * weight * touched + state + index

    def step(self) -> None:
        ops.masked_adamw_(
            self.params, self.grads, self.states, [], self.layout, LR, None, 0.9, 0.999, 1e-8, 0.01, False, None, None
        )


def fused(shapes, dtype: torch.dtype) -> float:
    """Milliseconds of a step of torch's fused AdamW."""
    params = [torch.nn.Parameter(torch.randn(s, device="cuda", dtype=dtype)) for s in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return median_ms(torch.optim.AdamW(params, lr=LR, fused=True).step)


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def optimizer_host_us(make: Callable) -> float:
    params = [torch.nn.Parameter(torch.randn(64, 64, device="cuda")) for _ in llama_shapes()]
    for param in params:
        param.grad = torch.randn_like(param)
    return host_us(make(params).step)


def half_the_rows(params) -> SparseMaskedAdamW:
    return SparseMaskedAdamW(params, lr=LR, masks={p: RowMask(range(0, 64, 2), p.shape) for p in params})


def versions() -> dict[str, str]:
    def run(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    return {
        "device": torch.cuda.get_device_name(),
        "driver": run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "torch": torch.__version__,
        "commit": run("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--layers", type=int, help="layers of the Llama-3-8B list; as many as fit unless given")
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() and ops.LOADED["cuda"]):
        raise SystemExit("needs a GPU and the CUDA library")
    torch.manual_seed(0)

    results = {"versions": versions(), "copy_gb_per_s": copy_bandwidth(), "host_us": {}, "steps": []}
    free()
    results["host_us"] = {
        "ours, op alone": host_us(Ours([(64, 64)] * len(llama_shapes()), torch.float32, "rows", 0.5).step),
        "ours, optimizer": optimizer_host_us(half_the_rows),
        "torch fused, optimizer": optimizer_host_us(partial(torch.optim.AdamW, lr=LR, fused=True)),
    }

    def save() -> None:
        arguments.out.write_text(json.dumps(results, indent=1))

    half, full = torch.bfloat16, torch.float32
    cases = [
        ("dense fp32", full, "dense", 1.0, False),
        ("rows 5 % fp32", full, "rows", 0.05, False),
        ("rows 25 % fp32", full, "rows", 0.25, False),
        ("columns 5 % fp32", full, "columns", 0.05, False),
        ("elements 5 % fp32", full, "elements", 0.05, False),
        ("2:4 fp32", full, "two-four", 0.5, False),
        ("dense bf16, no master", half, "dense", 1.0, False),
        ("dense bf16, master", half, "dense", 1.0, True),
        ("rows 5 % bf16, master", half, "rows", 0.05, True),
        ("elements 5 % bf16, master", half, "elements", 0.05, True),
    ]
    peers: dict[torch.dtype, float] = {}
    for dtype in (full, half):
        # Both sides of a comparison step the same list: what the dense step of either needs.
        layers = arguments.layers or layers_that_fit(16 if dtype == full else 17)
        shapes = llama_shapes(layers)
        peers[dtype] = fused(shapes, dtype)
        free()
        for name, case_dtype, kind, density, master in cases:
            if case_dtype != dtype:
                continue
            problem = Ours(shapes, dtype, kind, density, master)
            ms = median_ms(problem.step)
            bandwidth = problem.bytes / ms / 1e6
            results["steps"].append(
                {
                    "case": name,
                    "layers": layers,
                    "tensors": len(shapes),
                    "entries": problem.entries,
                    "ms": ms,
                    "torch_fused_ms": peers[dtype],
                    "torch_fused_dtype": str(dtype).removeprefix("torch."),
                    "speedup": peers[dtype] / ms,
                    "gb_per_s": bandwidth,
                    "of_copy": bandwidth / results["copy_gb_per_s"],
                }
            )
            save()
            del problem
            free()
    save()
    print(*(f"{k}: {v}" for k, v in results["versions"].items()), sep="\n")
    print(f"copy: {results['copy_gb_per_s']:.0f} GB/s")
    for name, value in results["host_us"].items():
        print(f"host time of a step of {len(llama_shapes())} tensors, {name}: {value:.0f} us")
    print(f"{'case':28}{'layers':>7}{'ms':>9}{'torch ms':>10}{'speedup':>9}{'GB/s':>7}{'of copy':>9}")
    for row in results["steps"]:
        print(
            f"{row['case']:28}{row['layers']:7d}{row['ms']:9.3f}{row['torch_fused_ms']:10.3f}"
            f"{row['speedup']:8.1f}x{row['gb_per_s']:7.0f}{row['of_copy']:8.0%}"
        )


if __name__ == "__main__":
    main()
