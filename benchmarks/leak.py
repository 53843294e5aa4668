"""How much of fifty steps goes where earlier domains live, ‖ΔW U‖²_F / ‖ΔW‖²_F: ours, and AdamW on projected gradients.

    python benchmarks/leak.py [--out FILE.json]

A two-layer network learns one domain, the inputs that it used become the bases U (a quarter of the input's directions),
and it learns a second one with weight decay 0.1. The largest leak of the two layers is printed, for every kind of mask,
in float32, on the float32 master of bfloat16 weights, and on the bfloat16 weights themselves.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

from sparse_cl import (
    ColumnMask,
    ElementMask,
    RowMask,
    SparseMaskedAdamW,
    SubspaceMemory,
    SubspaceProjectedAdamW,
    TwoFourMask,
)
from sparse_cl.lora import orthogonal_lora
from sparse_cl.masks import Mask

WIDTH, HIDDEN, STEPS = 256, 512, 50
OPTIONS = {"lr": 1e-3, "weight_decay": 0.1}


def inputs(domain: int, count: int, rng: torch.Generator) -> Tensor:
    """(count, WIDTH): rows in a quarter of the directions, half of them the other domain's too."""
    axes = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))).Q
    first = domain * WIDTH // 8
    return torch.randn(count, WIDTH // 4, generator=rng) @ axes[first : first + WIDTH // 4]


def learn(model: nn.Module, domain: int, optimizer: torch.optim.Optimizer, before_step=lambda: None) -> None:
    rng = torch.Generator().manual_seed(domain)
    target = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(10 + domain)) / WIDTH**0.5
    dtype = next(model.parameters()).dtype
    for _ in range(STEPS):
        x = inputs(domain, 128, rng)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x.to(dtype)).float(), (x @ target).relu()).backward()
        before_step()
        optimizer.step()


def after_one_domain(dtype: torch.dtype) -> tuple[nn.Module, SubspaceMemory]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN, bias=False), nn.ReLU(), nn.Linear(HIDDEN, WIDTH, bias=False))
    model = model.to(dtype)
    learn(model, 0, torch.optim.AdamW(model.parameters(), **OPTIONS))
    memory = SubspaceMemory(model, energy=0.99, source="inputs", max_rank=WIDTH // 4)
    with torch.no_grad(), memory.watch():
        model(inputs(0, 2048, torch.Generator().manual_seed(1)).to(dtype))
    memory.observe()
    memory.consolidate()
    return model, memory


def masks(kind: str, model: nn.Module) -> dict[str, Mask]:
    torch.manual_seed(1)
    make = {
        "rows 25 %": lambda p: RowMask(torch.randperm(p.shape[0])[: p.shape[0] // 4], p.shape),
        "columns 50 %": lambda p: ColumnMask(torch.randperm(p.shape[1])[: p.shape[1] // 2], p.shape),
        "elements 50 %": lambda p: ElementMask(torch.rand(p.shape) < 0.5),
        "elements 10 %": lambda p: ElementMask(torch.rand(p.shape) < 0.1),
        "2:4": lambda p: TwoFourMask((torch.rand(p.shape[0], p.shape[1] // 4, 4).argsort(-1) < 2).view(p.shape)),
    }
    return {name: make[kind](p) for name, p in model.named_parameters()} if kind in make else {}


def with_masters(model: nn.Module, optimizer: torch.optim.Optimizer, chosen: dict[str, Mask]) -> dict[str, Tensor]:
    """The weights, with the float32 masters in the place of the entries that have one."""
    weights = {}
    for name, p in model.named_parameters():
        weights[name] = p.detach().double().clone()
        if "master" in optimizer.state[p]:
            at = chosen[name].positions() if name in chosen else torch.arange(p.numel())
            weights[name].view(-1)[at] = optimizer.state[p]["master"].double().view(-1)
    return weights


def largest(memory: SubspaceMemory, before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return max(memory.leak(before, after).values())


def masked(kind: str, dtype: torch.dtype, ours: bool) -> tuple[float, float]:
    """Leak of the weights as they are stepped, and of the parameters."""
    model, memory = after_one_domain(dtype)
    chosen = masks(kind, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if ours:
        optimizer = SubspaceProjectedAdamW(model.named_parameters(), masks=chosen, memory=memory, **OPTIONS)
        learn(model, 1, optimizer)
    else:
        optimizer = SparseMaskedAdamW(model.named_parameters(), masks=chosen, **OPTIONS)

        def project() -> None:
            for name, p in model.named_parameters():
                memory.subspace(name).project_out_(p.grad)

        learn(model, 1, optimizer, project)
    stepped = largest(memory, before, with_masters(model, optimizer, chosen))
    return stepped, largest(memory, before, dict(model.named_parameters()))


def lora(dtype: torch.dtype, ours: bool) -> tuple[float, float]:
    """Leak of the product B A, and of the weights that it is merged into."""
    model, memory = after_one_domain(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    layers = dict(zip(before, (model[0], model[2]), strict=True))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=["0", "2"]))
    kept = orthogonal_lora(adapted, memory)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    if ours:
        learn(adapted, 1, SubspaceProjectedAdamW(trained, memory=kept, **OPTIONS))
    else:

        def project() -> None:
            for a, subspace in kept.items():
                subspace.project_out_(a.grad)

        learn(adapted, 1, torch.optim.AdamW(trained, **OPTIONS), project)
    tuned = dict(zip(layers, (m for m in adapted.modules() if hasattr(m, "get_delta_weight")), strict=True))
    product = {
        name: before[name].double() + layer.get_delta_weight("default").double() for name, layer in tuned.items()
    }
    stepped = largest(memory, before, product)
    merged = adapted.merge_and_unload()
    return stepped, largest(memory, before, dict(merged.named_parameters()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    columns = ("fp32", "gradient-projected", "bf16 master", "bf16 weights", "gradient-projected bf16")
    print(f"{'':14}" + "  ".join(f"{column:>24}" for column in columns))
    rows = {}
    for kind in ("dense", "rows 25 %", "columns 50 %", "2:4", "elements 50 %", "elements 10 %", "LoRA (B A)"):
        run = lora if kind.startswith("LoRA") else lambda dtype, ours, kind=kind: masked(kind, dtype, ours)
        fp32, peer = run(torch.float32, True)[0], run(torch.float32, False)[0]
        master, weights = run(torch.bfloat16, True)
        leaks = (fp32, peer, master, weights, run(torch.bfloat16, False)[0])
        rows[kind] = dict(zip(columns, leaks, strict=True))
        print(f"{kind:14}" + "  ".join(f"{value:24.1e}" for value in leaks), flush=True)
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"steps": STEPS, **OPTIONS, "torch": torch.__version__, "leak": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
