"""A whole training step of ElasticAdamW beside AdamW, on the CPU in float32: time and memory.

    python benchmarks/bench_elastic_step.py --json results.json             # a Llama of 110 M parameters, rank 64
    python benchmarks/bench_elastic_step.py --model DIR --rank auto         # a Hugging Face folder

In each round the model runs forward and backward once, and then every optimizer steps its parameters, in turn, so that
what else the machine does hits all alike. A whole step is forward, backward and the optimizer's; ratios are of one
round. Of ``every=4`` the mean of four steps counts, of which one corrects. Each linear layer, the head included, has a
random basis.

What to expect: a layer takes 6 m n FLOPs a token to train and 4 m n r a step to correct, so 1 + 4 r / (6 tokens) of the
products (1.04 for rank 64 and 1,024 tokens), and some passes over a scratch, which memory bandwidth bounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from sparse_cl import ElasticAdamW, SparseMaskedAdamW, Subspace

LR = 1e-5
EVERY = 4


def llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=32000,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def bases(model: nn.Module, rank: int | None) -> dict[Tensor, Subspace]:
    """A random basis for each linear layer's weight; without a rank, of as many directions as "auto" keeps at most."""
    found: dict[Tensor, Subspace] = {}
    by_width: dict[int, Subspace] = {}
    for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
        width = layer.in_features
        if width not in by_width:
            most = min(256, width // 8) if rank is None else rank
            basis = torch.linalg.qr(torch.randn(width, most)).Q.contiguous()
            by_width[width] = Subspace(basis, torch.logspace(2, -1, most))
        found[layer.weight] = by_width[width]
    return found


def optimizers(model: nn.Module, rank: int | None, whose: str) -> dict[str, tuple[torch.optim.Optimizer, int]]:
    """Each with the number of its steps in a round; ``whose`` AdamW is beside ours: "ours" or "both"."""
    memory, named = bases(model, rank), list(model.named_parameters())
    elastic = {"lr": LR, "memory": memory}
    theirs = {"torch AdamW": (torch.optim.AdamW(model.parameters(), lr=LR, fused=True), 1)} if whose == "both" else {}
    return {
        **theirs,
        "AdamW": (SparseMaskedAdamW(named, lr=LR), 1),
        "ElasticAdamW": (ElasticAdamW(named, **elastic), 1),
        f"ElasticAdamW every={EVERY}": (ElasticAdamW(named, **elastic, every=EVERY), EVERY),
    }


def compare(model: nn.Module, rank: int | None, batch: int, length: int, rounds: int, whose: str) -> dict:
    ids = torch.randint(model.config.vocab_size, (batch, length))
    contenders = optimizers(model, rank, whose)
    times: dict[str, list[float]] = {name: [] for name in ("forward and backward", *contenders)}

    def timed(name: str, call: Callable[[], object], calls: int = 1) -> None:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times[name].append((time.perf_counter() - start) / calls)

    def passes() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    order = list(contenders)
    for _ in range(rounds + 1):
        model.zero_grad()
        timed("forward and backward", passes)
        order = order[1:] + order[:1]
        for name in order:
            optimizer, steps = contenders[name]
            timed(name, optimizer.step, steps)
    times = {name: found[1:] for name, found in times.items()}  # the first round makes the states
    around = times["forward and backward"]
    whole = {name: [a + b for a, b in zip(around, times[name], strict=True)] for name in contenders}
    ratios = {}
    for name in order:
        for plain in ("AdamW", "torch AdamW"):
            if name.startswith("Elastic") and plain in whole:
                found = [a / b for a, b in zip(whole[name], whole[plain], strict=True)]
                ratios[f"{name} / {plain}"] = [round(x, 4) for x in statistics.quantiles(found, n=4)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": ids.numel(),
        "rounds": rounds,
        "median seconds": {name: round(statistics.median(found), 4) for name, found in times.items()},
        "quartiles of the ratio of whole steps": dict(sorted(ratios.items())),
        "state bytes": {
            name: sum(v.nbytes for s in o.state.values() for v in s.values()) for name, (o, _) in contenders.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Hugging Face folder (default: a Llama of 110 M parameters)")
    parser.add_argument("--rank", default="64", help="of the bases, or auto (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--adamw", choices=("ours", "both"), default="both", help="to compare with; torch's takes memory"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file to write")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32) if given.model else llama()
    rank = None if given.rank == "auto" else int(given.rank)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    facts = {"model": given.model.name if given.model else "llama-110m", "rank": given.rank, "threads": given.threads}
    result = facts | {"torch": torch.__version__, "commit": commit}
    result |= compare(model.train(), rank, given.batch_size, given.length, given.rounds, given.adamw)
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
