"""What each process holds and sends of a Llama of 98 M parameters that FSDP2 splits, beside what the planner says.

    OMP_NUM_THREADS=1 python benchmarks/sharded_memory.py [--processes 1,2,4] [--out FILE.json]

AdamW and `elastic` of rank 64 take a step of a first domain and two of a second, 128 tokens a process, over gloo on
CPUs: from the second step on, the optimizer's state is there in the passes.
One process holds the whole model. Peak memory is what is resident beyond what was before the model, of the process that
has most. The allocator is told to give back at once what is freed, which makes it slower, and all processes share the
cores: times mean little.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peak_memory import peak_mib
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_cl.four_domains.state import optimizer_state_bytes
from sparse_cl.layout import part
from sparse_cl.methods import METHODS
from sparse_cl.models.sharding import split
from sparse_cl.planner.count import Count, count
from sparse_cl.planner.model import Workload
from sparse_cl.planner.split import policy, sent

SIZES = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
TINY = {**SIZES, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
BATCH, LENGTH, STEPS, RANK = 1, 128, 2, 64
CASES: dict[str, dict[str, int]] = {"adamw": {}, "elastic": {"max_rank": RANK}}


class Sent(TorchDispatchMode):
    """Counts the bytes that a process sends, as the planner does."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "from_local") for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        self.bytes += sent(func, [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)])
        return out


def learn(case: str, sizes: dict[str, int], steps: int) -> dict[str, Any]:
    """Steps of a second domain after a first of one step."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if distributed.is_initialized():
        mesh = distributed.device_mesh.init_device_mesh("cpu", (distributed.get_world_size(),))
        split(model, mesh, mp_policy=policy("fp32"))
    method = METHODS[case](**CASES[case])
    shape = (steps + 1, BATCH, LENGTH if sizes is SIZES else 8)
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    ids = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(rank))
    batches = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i} for i in ids]
    found: dict[str, Any] = {}
    times = []
    for domain in (batches[:1], batches[1:]):
        model = method.before_domain(model, batches[:1]).train()
        optimizer = method.make_optimizer(model, 1e-4)
        for batch in domain:
            start = time.perf_counter()
            with Sent() as counted:
                model(**batch).loss.backward()
                optimizer.step()
            times.append(time.perf_counter() - start)
            found["sent_bytes"] = counted.bytes
            optimizer.zero_grad()
        if len(times) == 1:
            method.after_domain(model, batches[:1])
    memory = getattr(method, "memory", None)
    layers = [] if memory is None else memory.capacity().values()
    width = sum(layer["width"] for layer in layers)
    return {
        **found,
        "weights": sum(part(p).untyped_storage().nbytes() for p in model.parameters()),
        "state": optimizer_state_bytes(optimizer),
        "step_seconds": statistics.median(times[1:]),
        "used": sum(layer["used"] for layer in layers) / width if width else 0.0,
    }


def measure(rank: int, processes: int, folder: str) -> None:
    """One process; the first of them writes what it found, by case."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if processes > 1:
        distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=processes)
    found: dict[str, dict[str, Any]] = {}

    def run(case: str) -> None:
        found[case] = learn(case, SIZES, STEPS)

    for case in CASES:
        learn(case, TINY, 1)  # what libraries take on their first step is no part of a plan
        peaks: list[Any] = [peak_mib(functools.partial(run, case)) * 2**20] * processes
        if processes > 1:
            distributed.all_gather_object(peaks, peaks[0])
        found[case]["peak"] = max(peaks)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    if processes > 1:
        distributed.destroy_process_group()


def predicted(case: str, processes: int, used: float) -> Count:
    work = Workload(domains=2, batch_size=BATCH, length=LENGTH, precision="fp32", used=min(1.0, 2 * used))
    config = transformers.LlamaConfig(**SIZES)
    found = count(case, config, work, gpu=False, gpus=processes, **CASES[case])
    return {
        **{key: found[key] for key in ("weights", "state")},
        "peak": max(found["peaks"].values()),
        "sent_bytes": found["sent"][-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2,4", metavar="N[,N…]")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    rows: list[dict[str, Any]] = []
    for processes in map(int, arguments.processes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(measure, (processes, folder), processes)
            found = json.loads(Path(folder, "found.json").read_text())
        rows += [{"processes": processes, "case": case, "measured": measured} for case, measured in found.items()]
        write(arguments.out, rows)
    for row in rows:
        measured = row["measured"]
        row["predicted"] = said = predicted(row["case"], row["processes"], measured["used"])
        row["peak_error"] = said["peak"] / measured["peak"] - 1
        pairs = ", ".join(f"{key} {said[key] / 1e6:.1f} for {measured[key] / 1e6:.1f} MB" for key in said)
        print(f"{row['processes']} {row['case']}: {pairs} ({row['peak_error']:+.1%})", flush=True)
        write(arguments.out, rows)


def write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    if path is not None:
        facts = {"torch": torch.__version__, "sizes": SIZES, "batch": [BATCH, LENGTH], "rank": RANK}
        path.write_text(json.dumps({**facts, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
