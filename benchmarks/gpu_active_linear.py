"""A whole training step with ActiveLinear on a GPU, beside full AdamW, LoRA and SHiRA: time and peak memory, in bf16.

    python benchmarks/gpu_active_linear.py --out results.json

Shapes of Llama-3.2-1B and Llama-3-8B at random weights, 5 % of the MLP neurons, as in bench_active_linear.py. The
contenders run one after the other, each alone on the device; a step ends when the device has done it. Where full
training does not fit, all run with fewer layers of the same shapes. LoRA's adapters are float32, as PEFT has them.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import torch
from bench_active_linear import Shape, llama, make_contenders, trained_parameters
from transformers import AutoModelForCausalLM

#: Limits of the ratios of ours: of time to full training's and LoRA's, of peak memory to LoRA's.
BARS = {"time / full AdamW": 0.72, "time / LoRA": 1.0, "peak / LoRA": 1.0}


def gpu_shapes() -> dict[str, Shape]:
    return {
        "1 B": Shape(llama(2048, 8192, 16, 32, 128256, key_heads=8), 4, 1024),
        "8 B": Shape(llama(4096, 14336, 32, 32, 128256, key_heads=8, tied=False), 1, 1024),
    }


def tiny_shapes() -> dict[str, Shape]:
    return {"tiny": Shape(llama(16, 40, 2, 2, 64), 2, 8)}


def measure(make, ids: torch.Tensor, device: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of a step, peak bytes of the device, trained parameters."""
    on_gpu = device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    contender = make()
    times = [contender.step(ids, now) for _ in range(repeats + 2)][2:]
    parts = {part: 1e3 * statistics.median(t[part] for t in times) for part in times[0]}
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return {"ms": parts, "peak_bytes": peak, "trained": trained_parameters(contender.model)}


def free(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def compare(shape: Shape, device: str, repeats: int) -> dict:
    while True:
        torch.manual_seed(0)
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(shape.config)
        ids = torch.randint(shape.config.vocab_size, (shape.batch, shape.tokens), device=device)

        def fresh(config=shape.config) -> torch.nn.Module:
            with torch.device(device):
                return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

        result = {"layers": shape.config.num_hidden_layers, "tokens": ids.numel(), "contenders": {}}
        short = False
        for name, make in make_contenders(base, fresh, device, autocast=False).items():
            try:
                result["contenders"][name] = measure(make, ids, device, repeats)
            except torch.OutOfMemoryError:
                short = name
            free(device)
            if short:
                break
        if not short:
            return result
        if shape.config.num_hidden_layers <= 4:
            raise SystemExit(f"{short} does not fit this device, not even with four layers")
        shape.config.num_hidden_layers -= 4


def ratios(result: dict) -> dict[str, float]:
    mine, full, lora = (result["contenders"][name] for name in ("ours", "full AdamW", "LoRA"))
    return {
        "time / full AdamW": mine["ms"]["step"] / full["ms"]["step"],
        "time / LoRA": mine["ms"]["step"] / lora["ms"]["step"],
        "peak / LoRA": mine["peak_bytes"] / max(1, lora["peak_bytes"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on the CPU where there is no GPU")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.tiny:
        raise SystemExit("needs a GPU")
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    results: dict = {"device": name, "torch": torch.__version__, "shapes": {}}
    print(f"device: {name}")
    for shape_name, shape in (tiny_shapes() if arguments.tiny else gpu_shapes()).items():
        result = compare(shape, device, arguments.repeats)
        result["ratios"] = ratios(result)
        results["shapes"][shape_name] = result
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{shape_name}, {result['layers']} layers, {result['tokens']} tokens a step")
        for who, row in result["contenders"].items():
            times = "".join(
                f"{part} {row['ms'][part]:9.1f} ms  " for part in ("step", "forward", "backward", "optimizer")
            )
            print(f"  {who:12} {times} peak {row['peak_bytes'] / 2**30:6.2f} GiB  {row['trained']} trained")
    said = [
        f"{shape}: "
        + ", ".join(
            f"{k} {r['ratios'][k]:.2f} {'<=' if r['ratios'][k] <= bar else '>'} {bar}" for k, bar in BARS.items()
        )
        for shape, r in results["shapes"].items()
    ]
    print("; ".join(said))


if __name__ == "__main__":
    main()
