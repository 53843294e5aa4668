"""The cost planner against measured steps on this machine's CPU.

    OMP_NUM_THREADS=1 python benchmarks/planner_check.py --model base-5m [--recorded FILE.json] [--out FILE.json]

The device is this machine: its rate of float32 products and of copies is measured. The one number that is assumed, the
share of that rate that products reach, is fitted on AdamW at the model's own width; everything else is predicted: other
methods, and random models of other widths, lengths and batches. Time is the processor's, so that what else the machine
does counts little; each case runs in processes of its own, so that its peak memory is its own. With
--recorded nothing is measured: what an earlier check of the same cases measured is predicted anew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from peak_memory import peak_mib

from sparse_cl.methods import METHODS
from sparse_cl.planner.count import Count, count
from sparse_cl.planner.devices import Device, find_device
from sparse_cl.planner.model import Workload, read_config

METHOD_NAMES = ("adamw", "lora", "sparse-masked", "orthogonal")
STEPS, WARMUP = 4, 1
#: Sequences and tokens of a batch at the model's own width.
BATCH, LENGTH = 8, 128
#: Width, neurons, sequences, tokens: what is predicted from the fit, with the model's other sizes as they are.
OTHERS = ((128, 352, 8, 128), (512, 1408, 2, 128), (256, 704, 2, 512))


def best_seconds(call: Callable[[], object], repeats: int = 7) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def this_machine() -> Device:
    """Rates of a product of 1024 × 1024 matrices and of a copy far beyond the cache; its price is nothing."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    flops = 2 * 1024**3 / best_seconds(lambda: a @ b)
    source = torch.randn(1 << 26)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / best_seconds(lambda: target.copy_(source))
    return find_device("custom", tflops=flops / 1e12, bandwidth=bandwidth / 1e9, memory=64, price=0, mfu=1.0)


def measure(method_name: str, config: Any, batch_size: int, length: int, steps: int) -> dict[str, float]:
    """Median processor seconds of a step in the second domain, and MB at the peak beyond those before the model."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (steps, batch_size, length), generator=generator)
    batches = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i} for i in ids]
    # What the libraries take on their first step is no part of a plan.
    tiny = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    learn(METHODS[method_name](), tiny, [{name: t[:1, :4] % 32 for name, t in b.items()} for b in batches[:2]], [])
    times: list[float] = []
    used: list[float] = []
    mib = peak_mib(lambda: used.append(learn(METHODS[method_name](), config, batches, times)))
    return {"seconds": statistics.median(times[WARMUP:] or times), "peak_mb": mib * 2**20 / 1e6, "used": used[0]}


def learn(method: Any, config: Any, batches: list[dict], times: list[float]) -> float:
    """Steps of a second domain, after a first one of one batch; the share of directions that the first one uses."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    model = method.before_domain(model, batches[:1])
    optimizer = method.make_optimizer(model.train(), 1e-4)
    model(**batches[0]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    method.after_domain(model, batches[:1])
    model = method.before_domain(model, batches[:1]).train()
    optimizer = method.make_optimizer(model, 1e-4)
    for batch in batches:
        start = time.process_time()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - start)
    memory = getattr(method, "memory", None)
    if memory is None:
        return 0.0
    found = memory.capacity().values()
    return sum(layer["used"] for layer in found) / sum(layer["width"] for layer in found)


def plan(method: str, config: Any, batch_size: int, length: int, used: float) -> Count:
    """The second of two domains that use equally much is the one that is measured."""
    work = Workload(
        domains=2, tokens=1e6, batch_size=batch_size, length=length, precision="fp32", used=min(1.0, 2 * used)
    )
    return count(method, config, work, gpu=False)


def compute_and_moves(found: Count, device: Device) -> tuple[float, float]:
    """Seconds of a step in the second domain: of its products at the device's peak, and of what all other ops move."""
    return (found["passes"][-1] + found["steps"][-1]) / device.flops_fp32, found["moved"][-1] / device.bandwidth


def in_own_processes(*case: Any) -> dict[str, float]:
    """Time and memory, each in a process of its own.

    For memory the allocator is told to give back at once what is freed, else the peak is that of its free lists; it is
    slower then.
    """
    found = []
    for steps, threshold in ((STEPS + WARMUP, None), (2, "16384")):
        os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
        if threshold is not None:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = threshold
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(measure, *case, steps).result())
    return {**found[0], "peak_mb": found[1]["peak_mb"]}


def cases_of(base: Any) -> list[tuple[str, tuple[int, int, int, int]]]:
    sizes = [(base.hidden_size, base.intermediate_size, BATCH, LENGTH), *OTHERS]
    few = [width == base.hidden_size and i > 0 for i, (width, *_) in enumerate(sizes)]
    return [
        (m, size) for size, few in zip(sizes, few, strict=True) for m in (METHOD_NAMES[:2] if few else METHOD_NAMES)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a Llama, or its config.json")
    parser.add_argument("--recorded", type=Path, metavar="FILE.json", help="measure nothing: take what this measured")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = read_config(arguments.model)
    old = json.loads(arguments.recorded.read_text()) if arguments.recorded else None
    device = machine_of(old) if old else this_machine()
    share, rows = None, []
    for number, (method, (width, neurons, batch_size, length)) in enumerate(cases_of(base)):
        config = transformers.LlamaConfig(
            **{**base.to_dict(), "hidden_size": width, "intermediate_size": neurons, "head_dim": width // 4}
        )
        before = old["cases"][number] if old else None
        if before and (before["method"], before["width"], before["batch"]) != (method, width, [batch_size, length]):
            raise ValueError(f"--recorded: case {number} is not {method} at width {width}; it is of another model")
        if before:
            measured = {"seconds": before["measured_seconds"], "peak_mb": before["measured_peak_mb"]}
            used = before["used"]
        else:
            measured = in_own_processes(method, config, batch_size, length)
            used = measured.pop("used")
        found = plan(method, config, batch_size, length, used)
        compute, moves = compute_and_moves(found, device)
        if share is None:
            share = compute / (measured["seconds"] - moves)
            rates = f"{device.flops_fp32 / 1e9:.1f} GFLOP/s, {device.bandwidth / 1e9:.1f} GB/s"
            print(f"{rates}, fitted share {share:.3f}\n", flush=True)
        seconds, peak = compute / share + moves, max(found["peaks"].values()) / 1e6
        row = {
            "method": method,
            "width": width,
            "batch": [batch_size, length],
            "used": used,
            "measured_seconds": measured["seconds"],
            "predicted_seconds": seconds,
            "seconds_error": seconds / measured["seconds"] - 1,
            "measured_peak_mb": measured["peak_mb"],
            "predicted_peak_mb": peak,
            "peak_error": peak / measured["peak_mb"] - 1,
        }
        rows.append(row)
        now, peak = 1e3 * row["predicted_seconds"], row["predicted_peak_mb"]
        print(
            f"{method:14} width {width:4} batch {batch_size} x {length:4}: {now:7.1f} ms for "
            f"{1e3 * measured['seconds']:7.1f} ({row['seconds_error']:+.0%}), {peak:6.0f} MB "
            f"for {measured['peak_mb']:6.0f} ({row['peak_error']:+.0%})",
            flush=True,
        )
        if arguments.out:
            arguments.out.write_text(json.dumps({**facts(device, share), "cases": rows}, indent=1) + "\n")
    errors = {key: statistics.median(abs(row[key]) for row in rows[1:]) for key in ("seconds_error", "peak_error")}
    said = ", ".join(f"{key} {value:.1%}" for key, value in errors.items())
    print(f"\nmedian error of what was not fitted: {said}")


def machine_of(old: dict[str, Any]) -> Device:
    """The device on which an earlier check measured."""
    return find_device(
        "custom", tflops=old["gflops"] / 1e3, bandwidth=old["gb_per_second"], memory=64, price=0, mfu=1.0
    )


def facts(device: Device, share: float) -> dict[str, Any]:
    return {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gflops": device.flops_fp32 / 1e9,
        "gb_per_second": device.bandwidth / 1e9,
        "fitted_share": share,
    }


if __name__ == "__main__":
    main()
