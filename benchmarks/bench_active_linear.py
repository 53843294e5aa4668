"""A whole training step with ActiveLinear beside full AdamW, LoRA and SHiRA: time and memory, on the CPU.

    python benchmarks/bench_active_linear.py --json results.json

Each contender trains its own copy of a Llama in turn, one step after the other, so that what else the machine does hits
all alike; ratios are of steps of one round. Ours trains 5 % of the MLP neurons: rows of gate and up, columns of down.
LoRA and SHiRA adapt the same matrices, at the rank that gives as many trained parameters.

What to expect: full training does three matrix products a weight and token (forward, gradient of the input, gradient of
the weight). Ours leaves out the third but for the active part, and the second below the first active layer. LoRA does
too, and adds products of rank r and passes over outputs, which cost memory traffic rather than arithmetic. "products"
is ours over full training's; full training also pays for an optimizer step of all parameters.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from sparse_cl import SparseMaskedAdamW
from sparse_cl.masks import Mask
from sparse_cl.models.neuron_masks import neuron_masks, places
from sparse_cl.models.parts import find_mlps
from sparse_cl.nn import ActiveLinear, activate

FRACTION = 0.05
LR = 1e-4
MLP = ["gate_proj", "up_proj", "down_proj"]
BASE_5M = Path(__file__).parents[2] / "shared" / "models" / "base-5m"


@dataclass
class Shape:
    """A model and how much text a step sees."""

    config: LlamaConfig
    batch: int
    tokens: int = 256


def llama(
    hidden: int, neurons: int, layers: int, heads: int, vocabulary: int, key_heads: int | None = None, tied: bool = True
) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads or heads,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
    )


def cpu_shapes() -> dict[str, Shape]:
    known = AutoConfig.from_pretrained(BASE_5M) if BASE_5M.is_dir() else llama(256, 704, 6, 4, 2048)
    return {"base-5m": Shape(known, 16), "100 M": Shape(llama(768, 2048, 12, 12, 32000), 4)}


def rank_for(model: nn.Module, trained: int) -> int:
    """LoRA's rank at which it trains as many parameters, rounded up."""
    per_rank = sum(sum(m.weight.shape) for n, m in model.named_modules() if n.rpartition(".")[2] in MLP)
    return -(-trained // per_rank)


class Contender:
    """A model, its optimizer, and a step of both."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: str, autocast: bool):
        self.model, self.optimizer = model.train(), optimizer
        self.device, self.autocast = device, autocast

    def forward(self, ids: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            return self.model(input_ids=ids, labels=ids, use_cache=False).loss

    def step(self, ids: Tensor, now: Callable[[], float]) -> dict[str, float]:
        """Seconds of each part."""
        times = [now()]
        loss = self.forward(ids)
        times.append(now())
        loss.backward()
        times.append(now())
        self.optimizer.step()
        self.optimizer.zero_grad()
        times.append(now())
        parts = {k: b - a for k, a, b in zip(("forward", "backward", "optimizer"), times, times[1:], strict=False)}
        return {**parts, "step": times[-1] - times[0]}

    def memory(self, ids: Tensor) -> dict[str, int]:
        """Bytes of gradients, of optimizer state, of what is trained but no weight of the model, and of activations.

        A leaf is one tensor with the master copy in the optimizer's state, and counts as trained, as adapters do.
        """
        saved: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.layout is not torch.strided:
                return tensor
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        held = []  # else the address of what is freed would be used again
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or pack(t), lambda t: t):
            loss = self.forward(ids)
        loss.backward()
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        leaves = {m.active for m in self.model.modules() if isinstance(m, ActiveLinear)}
        adapters = sum(p.nbytes for n, p in trained if p in leaves or "lora_" in n or "shira_" in n)
        state = sum(v.nbytes for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
        state -= sum(p.nbytes for p in leaves)
        gradients = sum(p.grad.nbytes for _, p in trained)
        self.optimizer.zero_grad()
        return {
            "gradients": gradients,
            "state": state,
            "adapters": adapters,
            "activations": sum(saved.values()),
        }


def trained_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def choose_neurons(base: nn.Module) -> dict[str, Mask]:
    """Masks of so many random neurons of each MLP."""
    masks = {}
    for mlp in find_mlps(base):
        neurons = torch.randperm(mlp.neurons)[: max(1, round(FRACTION * mlp.neurons))]
        masks |= neuron_masks(places(mlp), neurons)
    return masks


def train(model: nn.Module, optimizer: type, device: str = "cpu", autocast: bool = False, **options) -> Contender:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return Contender(model, optimizer(named, lr=LR, **options), device, autocast)


def make_contenders(base: nn.Module, fresh: Callable[[], nn.Module]) -> dict[str, Callable[[], Contender]]:
    """Ways to make each contender from a model that ``fresh`` gives, of the shapes of ``base``."""
    from peft import LoraConfig, ShiraConfig, get_peft_model

    masks = choose_neurons(base)
    rank = rank_for(base, sum(mask.numel for mask in masks.values()))

    def ours() -> Contender:
        model = fresh()
        activate(model, masks)
        return train(model, SparseMaskedAdamW, autocast=True)

    def adapted(config) -> Contender:
        return train(get_peft_model(fresh(), config), torch.optim.AdamW, autocast=True, fused=True)

    return {
        "full AdamW": lambda: train(fresh(), torch.optim.AdamW, autocast=True, fused=True),
        "LoRA": lambda: adapted(LoraConfig(r=rank, lora_alpha=rank, target_modules=MLP)),
        "ours": ours,
        "SHiRA": lambda: adapted(ShiraConfig(r=rank, target_modules=MLP)),
    }


def products(model: nn.Module) -> float:
    """Matrix products of a step of ours over those of full training, by the sizes of the weights."""
    full = done = 0.0
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    below = next(i for i, (_, m) in enumerate(linears) if isinstance(m, ActiveLinear))
    for i, (_, module) in enumerate(linears):
        size = module.weight.numel()
        full += 3 * size
        active = module.active.numel() if isinstance(module, ActiveLinear) else 0
        done += size + active + (size if i > below else 0)
    return done / full


def compare(shape: Shape, seconds: float, now: Callable[[], float] = time.perf_counter) -> dict:
    """Steps of all contenders in turn for about so many seconds, on the CPU in bf16 autocast."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(shape.config, dtype=torch.float32)
    ids = torch.randint(shape.config.vocab_size, (shape.batch, shape.tokens))
    contenders = {name: make() for name, make in make_contenders(base, partial(copy.deepcopy, base)).items()}
    result = {
        "parameters": sum(p.numel() for p in base.parameters()),
        "tokens": ids.numel(),
        "trained": {name: trained_parameters(c.model) for name, c in contenders.items()},
        "products": products(contenders["ours"].model),
    }
    del base
    for contender in contenders.values():
        contender.step(ids, now)
    result["memory"] = {name: c.memory(ids) for name, c in contenders.items()}
    return result | interleave(contenders, ids, seconds, now)


def interleave(contenders: dict[str, Contender], ids: Tensor, seconds: float, now: Callable[[], float]) -> dict:
    rounds: list[dict[str, dict[str, float]]] = []
    start, names = now(), list(contenders)
    while len(rounds) < 5 or now() - start < seconds:
        # Each in each place: what runs after full training finds its caches and its memory full of it.
        names = names[1:] + names[:1]
        rounds.append({name: contenders[name].step(ids, now) for name in names})

    def quartiles(values: list[float]) -> list[float]:
        low, middle, high = statistics.quantiles(values, n=4)
        return [middle, low, high]

    return {
        "rounds": len(rounds),
        "seconds": {
            name: {part: statistics.median(r[name][part] for r in rounds) for part in rounds[0][name]}
            for name in contenders
        },
        "ratios": {
            f"ours / {other}": quartiles([r["ours"]["step"] / r[other]["step"] for r in rounds])
            for other in contenders
            if other != "ours"
        },
    }


def show(name: str, result: dict) -> None:
    print(f"{name}: {result['parameters'] / 1e6:.1f} M parameters, {result['tokens']} tokens a step", end="")
    print(f", {result['rounds']} rounds; products of ours / full: {result['products']:.2f}")
    print(f"  {'':12}{'trained':>10}{'step ms':>9}{'forward':>9}{'backward':>9}{'optim.':>8}", end="")
    print(f"{'grad MB':>9}{'state MB':>9}{'adapt MB':>9}{'saved MB':>9}")
    for who, seconds in result["seconds"].items():
        times = [f"{1e3 * seconds[part]:9.1f}" for part in ("step", "forward", "backward", "optimizer")]
        held = [f"{result['memory'][who][k] / 1e6:9.2f}" for k in ("gradients", "state", "adapters", "activations")]
        print(f"  {who:12}{result['trained'][who]:10d}{''.join(times)[:-9]}{times[-1][1:]}{''.join(held)}")
    for ratio, (middle, low, high) in result["ratios"].items():
        print(f"  {ratio}: {middle:.3f} (quartiles {low:.3f} to {high:.3f})")
    mine, lora = (result["memory"][who] for who in ("ours", "LoRA"))
    held = [sum(m[k] for k in ("gradients", "state", "adapters")) for m in (mine, lora)]
    print(f"  gradients, state and what is trained beside the model, ours / LoRA: {held[0] / held[1]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=80, help="for each shape")
    parser.add_argument("--batch-size", type=int, help="sequences of 256 tokens (default: 16 and 4)")
    parser.add_argument("--shape", choices=["base-5m", "100 M"], action="append", help="all unless given")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {"threads": arguments.threads, "torch": torch.__version__, "fraction": FRACTION}
    for name, shape in cpu_shapes().items():
        if not arguments.shape or name in arguments.shape:
            shape.batch = arguments.batch_size or shape.batch
            results[name] = compare(shape, arguments.seconds)
            show(name, results[name])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
