"""What probing costs beside the plain passes that it needs, on a random Llama of 1 G parameters in bfloat16.

    python benchmarks/gpu/probes.py --json out/gpu.json [--tiny]

Forward probes are compared with the same forward passes without anything watched (no logits but the last, as the probes
run them), backward probes with a forward and backward pass to the same weights. Times are medians over rounds in which
plain and probed passes take turns; of CUDA events on a GPU, by the clock elsewhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from benchmarks.bench_active_linear import llama
from benchmarks.gpu.run import DEVICE, ON_GPU, Run, free, main, once_ms
from benchmarks.gpu.steps import make_model
from sparse_cl.models.losses import answer_loss
from sparse_cl.models.parts import linear_layers
from sparse_cl.models.passes import evaluation, stream
from sparse_cl.probes.activation import ActivationProbe
from sparse_cl.probes.features import FeatureProbe
from sparse_cl.probes.gradients import GradientProbe
from sparse_cl.probes.inputs import InputProbe

#: Layers, width, neurons, heads, key and value heads, vocabulary; sequences and tokens of a batch; rounds.
LARGE = (16, 2048, 8192, 32, 8, 128256, 8, 1024, 8)
TINY = (2, 32, 64, 4, 2, 97, 2, 16, 2)
BATCHES = 3

Batch = dict[str, Tensor]


def config_of(sizes: tuple[int, ...]) -> LlamaConfig:
    layers, width, neurons, heads, grouped, vocabulary = sizes[:6]
    return llama(width, neurons, layers, heads, vocabulary, key_heads=grouped)


def make_batches(sizes: tuple[int, ...]) -> list[Batch]:
    """Random tokens; the second half of each sequence is the answer."""
    vocabulary, sequences, length = sizes[5:8]
    ids = torch.randint(0, vocabulary, (BATCHES, sequences, length), device=DEVICE)
    answers = ids.clone()
    answers[..., : length // 2] = -100
    return [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": a} for i, a in zip(ids, answers, strict=True)
    ]


def take_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            ms = once_ms(call)
            if number:
                times[name].append(ms)
    return times


def peak_gib(call: Callable[[], object]) -> float | None:
    if not ON_GPU:
        return None
    free()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 2**30


def compare(plain: Callable[[], object], probed: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict]:
    """Each probed pass beside the plain one of the same rounds: medians, and the median of the ratios in a round."""
    times = take_turns({"plain": plain, **probed}, rounds)
    rows = {}
    for name, call in {"plain": plain, **probed}.items():
        ratios = [own / base for own, base in zip(times[name], times["plain"], strict=True)]
        rows[name] = {
            "ms": statistics.median(times[name]),
            "ratio": statistics.median(ratios),
            "ratio_least": min(ratios),
            "ratio_most": max(ratios),
            "peak_gib": peak_gib(call),
        }
    return rows


def forward_probes(model: nn.Module, batches: list[Batch], rounds: int) -> dict[str, dict]:
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
    )


def backward_probes(model: nn.Module, batches: list[Batch], rounds: int) -> dict[str, dict]:
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
    )


def result_ms(model: nn.Module, batches: list[Batch]) -> dict[str, float]:
    """Of ActivationProbe.result(), which comes once a domain, not once a batch."""
    probe = ActivationProbe(model)
    stream(model, probe.watches(), batches)
    return {"ms": once_ms(probe.result)}


def cases(run: Run) -> None:
    sizes = TINY if run.tiny else LARGE

    @cache
    def made() -> tuple[nn.Module, list[Batch]]:
        return make_model(config_of(sizes)).eval(), make_batches(sizes)

    def pairs(measure: Callable) -> dict:
        model, batches = made()
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "batch": list(sizes[6:8]),
            "batches": BATCHES,
            "rounds": sizes[8],
            "probes": measure(model, batches, sizes[8]),
        }

    run.case("forward", partial(pairs, forward_probes), needs=10)
    run.case("backward", partial(pairs, backward_probes), needs=6)
    run.case("result", lambda: result_ms(*made()), needs=2)


if __name__ == "__main__":
    main("probes", __doc__, cases)
