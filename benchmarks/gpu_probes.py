"""What probing costs beside the plain passes that it needs, on a random Llama of 1 G parameters in bfloat16.

    python benchmarks/gpu_probes.py --out results.json [--tiny]

Forward probes are compared with the same forward passes without anything watched (no logits but the last, as the probes
run them), backward probes with a forward and backward pass to the same weights. Times are medians over rounds in which
plain and probed passes take turns; of CUDA events on a GPU, by the clock elsewhere. The bar is 1.2 for ActivationProbe.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from gpu_masked_adamw import free, versions
from torch import Tensor, nn

from sparse_cl.probes.activation import ActivationProbe
from sparse_cl.probes.features import FeatureProbe
from sparse_cl.probes.gradients import GradientProbe
from sparse_cl.probes.inputs import InputProbe
from sparse_cl.probes.losses import answer_loss
from sparse_cl.probes.parts import linear_layers
from sparse_cl.probes.passes import evaluation, stream

#: Layers, width, neurons, heads, key and value heads, vocabulary; sequences and tokens of a batch; rounds.
LARGE = (16, 2048, 8192, 32, 8, 128256, 8, 1024, 8)
TINY = (2, 32, 64, 4, 2, 97, 2, 16, 2)
BATCHES = 3
BAR = 1.2

Batch = dict[str, Tensor]


def make_model(sizes: tuple[int, ...], device: str) -> nn.Module:
    layers, width, neurons, heads, grouped, vocabulary = sizes[:6]
    config = transformers.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=neurons,
        num_attention_heads=heads,
        num_key_value_heads=grouped,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def make_batches(sizes: tuple[int, ...], device: str) -> list[Batch]:
    """Random tokens; the second half of each sequence is the answer."""
    vocabulary, sequences, length = sizes[5:8]
    ids = torch.randint(0, vocabulary, (BATCHES, sequences, length), device=device)
    answers = ids.clone()
    answers[..., : length // 2] = -100
    return [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": a} for i, a in zip(ids, answers, strict=True)
    ]


def once_ms(call: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def take_turns(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            ms = once_ms(call, device)
            if number:
                times[name].append(ms)
    return times


def peak_gib(call: Callable[[], object], device: str) -> float | None:
    if device == "cpu":
        return None
    free()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 2**30


def compare(
    plain: Callable[[], object], probed: dict[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, dict]:
    """Each probed pass beside the plain one of the same rounds: medians, and the median of the ratios in a round."""
    times = take_turns({"plain": plain, **probed}, rounds, device)
    rows = {}
    for name, call in {"plain": plain, **probed}.items():
        ratios = [own / base for own, base in zip(times[name], times["plain"], strict=True)]
        rows[name] = {
            "ms": statistics.median(times[name]),
            "ratio": statistics.median(ratios),
            "ratio_least": min(ratios),
            "ratio_most": max(ratios),
            "peak_gib": peak_gib(call, device),
        }
    return rows


def forward_probes(model: nn.Module, batches: list[Batch], rounds: int, device: str) -> dict[str, dict]:
    def streamed(make: Callable[[], object]) -> Callable[[], object]:
        def call() -> None:
            probe = make()
            stream(model, probe.watches(), batches, tokens=probe.tokens)

        return call

    together = (ActivationProbe, InputProbe, FeatureProbe)

    def all_in_one_pass() -> None:
        stream(model, [watch for probe in together for watch in probe(model).watches()], batches)

    return compare(
        lambda: stream(model, [], batches),
        {
            **{probe.__name__: streamed(lambda probe=probe: probe(model)) for probe in together},
            "ActivationProbe, all tokens": streamed(lambda: ActivationProbe(model, tokens="all")),
            "all three in one pass": all_in_one_pass,
        },
        rounds,
        device,
    )


def backward_probes(model: nn.Module, batches: list[Batch], rounds: int, device: str) -> dict[str, dict]:
    weights = [layer.weight for layer in linear_layers(model).values()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)

    def plain() -> None:
        with evaluation(model), torch.enable_grad():
            for batch in batches:
                loss, count = answer_loss(model, batch)
                torch.autograd.grad(loss / count, weights)

    return compare(
        plain,
        {"GradientProbe": lambda: GradientProbe(model).run(batches)},
        rounds,
        device,
    )


def result_ms(model: nn.Module, batches: list[Batch], device: str) -> float:
    """Of ActivationProbe.result(), which comes once a domain, not once a batch."""
    probe = ActivationProbe(model)
    stream(model, probe.watches(), batches)
    return once_ms(probe.result, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="shapes that take no time, on whatever device there is")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.tiny:
        raise SystemExit("needs a GPU; --tiny runs anywhere, and measures nothing of interest")
    sizes = TINY if arguments.tiny else LARGE
    rounds = sizes[8]
    model, batches = make_model(sizes, device), make_batches(sizes, device)
    known = versions() if device == "cuda" else {"device": platform.processor() or "cpu", "torch": torch.__version__}
    results: dict = {
        "versions": known,
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": list(sizes[6:8]),
        "batches": BATCHES,
        "rounds": rounds,
    }
    print(*(f"{k}: {v}" for k, v in known.items()), sep="\n", flush=True)
    for name, measure in {"forward": forward_probes, "backward": backward_probes}.items():
        results[name] = measure(model, batches, rounds, device)
        arguments.out.write_text(json.dumps(results, indent=1))
        for probe, row in results[name].items():
            memory = "" if row["peak_gib"] is None else f", peak {row['peak_gib']:.1f} GiB"
            spread = f"{row['ratio_least']:.2f} to {row['ratio_most']:.2f}"
            print(f"{name}: {probe}: {row['ms']:.4g} ms, {row['ratio']:.3f} x plain ({spread}){memory}", flush=True)
    results["result_ms"] = result_ms(model, batches, device)
    ratio = results["forward"]["ActivationProbe"]["ratio"]
    results["bar"] = {"ratio": ratio, "limit": BAR, "met": ratio <= BAR}
    arguments.out.write_text(json.dumps(results, indent=1))
    print(
        f"probes: ActivationProbe takes {ratio:.3f} of a forward pass; the bar of {BAR} is "
        f"{'met' if ratio <= BAR else 'missed'}"
    )


if __name__ == "__main__":
    main()
