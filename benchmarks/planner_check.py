"""The cost planner against measured steps on this machine's CPU.

    OMP_NUM_THREADS=1 python benchmarks/planner_check.py --model base-5m [--out FILE.json]

The device is this machine: its rate of float32 products and of copies is measured. The one number that is assumed, the
share of that rate that a step reaches, is fitted on AdamW at the model's own width; everything else is predicted: other
methods, and random models of other widths, lengths and batches. Time is the processor's, so that what else the machine
does counts little; each case runs in processes of its own, so that its peak memory is its own.
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
from sparse_cl.planner.cost import Cost, Workload, cost
from sparse_cl.planner.devices import Device, find_device
from sparse_cl.planner.shapes import read_config, shape_of_config

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
    return find_device("custom", tflops=flops / 1e12, bandwidth=bandwidth / 1e9, memory=64, price=0, utilization=1.0)


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
    method.make_optimizer(model, 1e-4)
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


def plan(method: str, config: Any, batch_size: int, length: int, used: float, device: Device) -> Cost:
    """The second of two domains that use equally much is the one that is measured."""
    work = Workload(
        domains=2, tokens=1e6, batch_size=batch_size, length=length, precision="fp32", used=min(1.0, 2 * used)
    )
    return cost(method, shape_of_config(config, "model", torch.float32), work, device)


def second_domain_seconds(found: Cost, work_tokens: int, device: Device) -> float:
    """Of a step in the second domain: the plan's projections are the mean of none and of this domain's."""
    flops = work_tokens * found.token_flops + 2 * found.projection_flops
    return flops / (device.flops_fp32 * device.utilization) + found.demand.step_bytes / device.bandwidth


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a Llama, or its config.json")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = read_config(arguments.model)
    device = this_machine()
    cases = [(base.hidden_size, base.intermediate_size, BATCH, LENGTH), *OTHERS]
    rows = []
    for width, neurons, batch_size, length in cases:
        config = transformers.LlamaConfig(
            **{**base.to_dict(), "hidden_size": width, "intermediate_size": neurons, "head_dim": width // 4}
        )
        for method in METHOD_NAMES if not rows or width != base.hidden_size else METHOD_NAMES[:2]:
            measured = in_own_processes(method, config, batch_size, length)
            used = measured.pop("used")
            found = plan(method, config, batch_size, length, used, device)
            if not rows:
                compute = measured["seconds"] - found.demand.step_bytes / device.bandwidth
                share = batch_size * length * found.token_flops / (device.flops_fp32 * compute)
                device = find_device(
                    "custom",
                    tflops=device.flops_fp32 / 1e12,
                    bandwidth=device.bandwidth / 1e9,
                    memory=64,
                    price=0,
                    utilization=share,
                )
                print(
                    f"{device.flops_fp32 / 1e9:.1f} GFLOP/s, {device.bandwidth / 1e9:.1f} GB/s, fitted share "
                    f"{share:.3f}\n",
                    flush=True,
                )
            seconds = second_domain_seconds(found, batch_size * length, device)
            row = {
                "method": method,
                "width": width,
                "batch": [batch_size, length],
                "used": used,
                "measured_seconds": measured["seconds"],
                "predicted_seconds": seconds,
                "seconds_error": seconds / measured["seconds"] - 1,
                "measured_peak_mb": measured["peak_mb"],
                "predicted_peak_mb": found.memory.peak / 1e6,
                "peak_error": found.memory.peak / 1e6 / measured["peak_mb"] - 1,
            }
            rows.append(row)
            print(
                f"{method:14} width {width:4} batch {batch_size} x {length:4}: {1e3 * seconds:7.1f} ms for "
                f"{1e3 * measured['seconds']:7.1f} ({row['seconds_error']:+.0%}), {row['predicted_peak_mb']:6.0f} MB "
                f"for {row['measured_peak_mb']:6.0f} ({row['peak_error']:+.0%})",
                flush=True,
            )
            if arguments.out:
                arguments.out.write_text(json.dumps({**facts(device), "cases": rows}, indent=1) + "\n")
    errors = {name: statistics.median(abs(row[name]) for row in rows[1:]) for name in ("seconds_error", "peak_error")}
    print(
        "\nmedian error of what was not fitted: " + ", ".join(f"{name} {value:.0%}" for name, value in errors.items())
    )


def facts(device: Device) -> dict[str, Any]:
    return {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gflops": device.flops_fp32 / 1e9,
        "gb_per_second": device.bandwidth / 1e9,
        "fitted_share": device.utilization,
    }


if __name__ == "__main__":
    main()
