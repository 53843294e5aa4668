"""Whole training steps on a GPU in bf16, beside full AdamW's: active layers and LoRA, projected and pulled updates.

    python benchmarks/gpu/steps.py --json out/gpu.json [--tiny]

Shapes of Llama-3.2-1B and Llama-3-8B at random weights. Active layers train 5 % of the MLP neurons, LoRA as many
parameters, with adapters in float32, as PEFT makes them, and in bfloat16. Projected and pulled steps have a basis of
their own for each input of a linear layer. SHiRA is left out: making its masks takes minutes at this size.

Each contender runs alone on the device. All of a comparison have the same number of layers, "layers": as many as fit
by the largest's count of bytes. Where they are few, embeddings and logits weigh more than in the whole model.
A step's time is the median over whole steps, by the clock, the device idle before and after; the times of its parts
come from further steps in which each part waits for the device.
"""

from __future__ import annotations

import copy
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.bench_active_linear import (
    LR,
    MLP,
    Contender,
    Shape,
    choose_neurons,
    llama,
    rank_for,
    train,
    trained_parameters,
)
from benchmarks.gpu.run import DEVICE, ON_GPU, Run, device_bytes, host_ms, main, synchronize
from sparse_cl import (
    ElasticAdamW,
    LowRankPull,
    ProjectedAdamW,
    SparseMaskedAdamW,
    Subspace,
    SubspaceProjectedAdamW,
)
from sparse_cl.nn import activate

#: Bytes a parameter of the largest contender: weight, gradient and moments in bf16; or moments and master in fp32.
ACTIVE_BYTES, PROJECTED_BYTES = 8, 16
#: What a projected step holds besides, and the libraries.
SLACK = 2 << 30
#: Linear layers that share an input.
SHARED_INPUT = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}
#: A launch, as the CUDA runtime and driver call it; on a CPU, an operator.
LAUNCH = r"cu(da)?Launch" if ON_GPU else "aten::"


def shapes(tiny: bool) -> dict[str, Shape]:
    """With the batch of the comparison of active layers."""
    if tiny:
        return {"1 B": Shape(llama(16, 40, 2, 2, 64), 2, 8), "8 B": Shape(llama(16, 48, 2, 2, 64, tied=False), 1, 8)}
    return {
        "1 B": Shape(llama(2048, 8192, 16, 32, 128256, key_heads=8), 4, 1024),
        "8 B": Shape(llama(4096, 14336, 32, 32, 128256, key_heads=8, tied=False), 1, 1024),
    }


def blank(config: LlamaConfig) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def make_model(config: LlamaConfig) -> nn.Module:
    """Random weights, drawn on the device: transformers' own start of so many takes longer than all the steps."""
    model = blank(config).to_empty(device=DEVICE)
    model.tie_weights()
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config).to(DEVICE)
    for name, param in model.named_parameters():
        with torch.no_grad():
            param.fill_(1) if "norm" in name else param.normal_(std=0.02)
    return model


def with_layers(config: LlamaConfig, layers: int) -> LlamaConfig:
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    return config


def layers_that_fit(config: LlamaConfig, tokens: int, bytes_per_parameter: int) -> int:
    """By counting: weights and state, what a layer keeps of a token for its backward pass, logits and their softmax."""
    one, two = (sum(p.numel() for p in blank(with_layers(config, n)).parameters()) for n in (1, 2))
    kept = 36 * config.hidden_size + 10 * config.intermediate_size
    layer = bytes_per_parameter * (two - one) + tokens * kept
    rest = bytes_per_parameter * (2 * one - two) + tokens * 16 * config.vocab_size
    room = 0.9 * device_bytes() - SLACK - rest
    return max(1, min(config.num_hidden_layers, int(room // layer)))


def measure(make: Callable[[], Contender], config: LlamaConfig, batch: int, tokens: int, repeats: int) -> dict:
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    torch.set_float32_matmul_precision("highest")  # for this contender, unless it asks for less
    ids = torch.randint(config.vocab_size, (batch, tokens), device=DEVICE)
    contender = make()

    def now() -> float:
        synchronize()
        return time.perf_counter()

    def whole() -> float:
        start = now()
        contender.step(ids, time.perf_counter)
        return 1e3 * (now() - start)

    steps = [whole() for _ in range(repeats + 2)][2:]
    parts = [contender.step(ids, now) for _ in range(3)]
    return {
        "step_ms": statistics.median(steps),
        **{f"{k}_ms": 1e3 * statistics.median(p[k] for p in parts) for k in ("forward", "backward", "optimizer")},
        "peak_bytes": torch.cuda.max_memory_allocated() if ON_GPU else 0,
        "trained": trained_parameters(contender.model),
        "parameters": sum(p.numel() for p in contender.model.parameters()),
        "tokens": ids.numel(),
    }


def active_contenders(config: LlamaConfig) -> dict[str, Callable[[], Contender]]:
    from peft import LoraConfig, get_peft_model

    base = blank(config)
    masks = choose_neurons(base)
    rank = rank_for(base, sum(mask.numel for mask in masks.values()))

    def ours() -> Contender:
        model = make_model(config)
        activate(model, masks)
        return train(model, SparseMaskedAdamW, DEVICE)

    def lora(**options) -> Contender:
        adapters = LoraConfig(r=rank, lora_alpha=rank, target_modules=MLP)
        return train(get_peft_model(make_model(config), adapters, **options), torch.optim.AdamW, DEVICE, fused=True)

    return {
        "full AdamW": lambda: train(make_model(config), torch.optim.AdamW, DEVICE, fused=True),
        "active 5 %": ours,
        "LoRA, fp32 adapters": lora,
        "LoRA, bf16 adapters": lambda: lora(autocast_adapter_dtype=False),
    }


def random_bases(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """{weight: (n, rank) orthonormal}; layers of one input share one, no others do, so that none is left in a cache."""
    bases: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and "lm_head" not in name:
            block, _, kind = name.rpartition(".")
            key = f"{block}.{SHARED_INPUT.get(kind, kind)}"
            if key not in made:
                made[key] = torch.linalg.qr(torch.randn(layer.in_features, rank, device=DEVICE)).Q
            bases[f"{name}.weight"] = made[key]
    return bases


def projected(bases: dict[str, Tensor]) -> dict:
    """Class and options of an optimizer that keeps out of these bases."""
    return dict(optimizer=SubspaceProjectedAdamW, memory=bases, rest="train")


def pulled(bases: dict[str, Tensor]) -> dict:
    """Class and options of one that pulls the weights back along them."""
    strengths = {rank: torch.logspace(2, -1, rank, device=DEVICE) for rank in {b.shape[1] for b in bases.values()}}
    pulls = {name: LowRankPull(basis, strengths[basis.shape[1]]) for name, basis in bases.items()}
    return dict(optimizer=ProjectedAdamW, projections=pulls, rest="train")


def budgeted(bases: dict[str, Tensor]) -> dict:
    """Class and options of one that keeps what they move within a budget."""
    used = {name: Subspace(basis) for name, basis in bases.items()}
    return dict(optimizer=ElasticAdamW, memory=used, budget=1e-4)


def projected_contenders(config: LlamaConfig, ranks: tuple[int, ...]) -> dict[str, Callable[[], Contender]]:
    def stepped(options: Callable[[dict[str, Tensor]], dict], rank: int, precision: str = "highest") -> Contender:
        torch.set_float32_matmul_precision(precision)
        model = make_model(config)
        return train(model, device=DEVICE, **options(random_bases(model, rank)))

    return {
        "full AdamW": lambda: train(make_model(config), torch.optim.AdamW, DEVICE, fused=True),
        "our AdamW, fp32 master": lambda: train(make_model(config), SparseMaskedAdamW, DEVICE),
        **{
            f"{options.__name__}, rank {rank}": partial(stepped, options, rank)
            for rank in ranks
            for options in (pulled, budgeted, projected)
        },
        f"pulled, rank {ranks[-1]}, TF32": partial(stepped, pulled, ranks[-1], "high"),
    }


def small_optimizer(options: Callable[[dict[str, Tensor]], dict], blocks: int) -> torch.optim.Optimizer:
    """Of matrices so small that the host is what a step waits for, in the shapes of a block of Llama's, over 64."""
    block = [(64, 64), (16, 64), (16, 64), (64, 64), (224, 64), (224, 64), (64, 224)]
    named = []
    for i, shape in enumerate(block * blocks):
        weight = nn.Parameter(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16))
        weight.grad = torch.randn_like(weight)
        named.append((f"weight{i}", weight))
    found = options({name: torch.linalg.qr(torch.randn(w.shape[1], 8, device=DEVICE)).Q for name, w in named})
    return found.pop("optimizer")(named, lr=LR, **found)


def host_time(options: Callable, blocks: int) -> dict:
    return {"host_ms": host_ms(small_optimizer(options, blocks).step, repeats=20, warmup=3), "layers": 7 * blocks}


def launches(options: Callable, blocks: int) -> dict:
    from torch.profiler import ProfilerActivity, profile

    optimizer = small_optimizer(options, blocks)
    for _ in range(2):
        optimizer.step()
    synchronize()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]) as seen:
        optimizer.step()
        synchronize()
    calls = Counter(event.name for event in seen.events() if re.match(rf"{LAUNCH}|cuda(Memcpy|Memset)", event.name))
    count = sum(number for name, number in calls.items() if re.match(LAUNCH, name))
    if not count:
        raise RuntimeError("the profiler saw no launch")
    return {"launches_per_layer": count / (7 * blocks), "calls": dict(calls.most_common(20)), "layers": 7 * blocks}


def cases(run: Run) -> None:
    blocks, ranks, repeats = (1, (2, 4), 1) if run.tiny else (32, (64, 128), 7)
    for options in (projected, pulled):
        run.case(f"host time, {options.__name__}", partial(host_time, options, blocks), needs=2)
    for part in ("active", "projected"):
        for name, shape in shapes(run.tiny).items():
            batch = shape.batch if part == "active" else 4
            size = ACTIVE_BYTES if part == "active" else PROJECTED_BYTES
            config = with_layers(shape.config, layers_that_fit(shape.config, batch * shape.tokens, size))
            make = active_contenders(config) if part == "active" else projected_contenders(config, ranks)
            for who, contender in make.items():
                # What a ratio is taken of must have run at the same size on the same device.
                same = dict(layers=config.num_hidden_layers, device=run.device)
                run.case(
                    f"{part}, {name}: {who}",
                    partial(measure, contender, config, batch, shape.tokens, repeats),
                    needs=6,
                    **same,
                )
    # Last: what the profiler leaves behind slows later launches.
    for options in (projected, pulled):
        run.case(f"launches, {options.__name__}", partial(launches, options, blocks), needs=2)


if __name__ == "__main__":
    main("steps", __doc__, cases)
