"""What the activation probe costs over the forward passes that it watches, on the CPU, and its peak memory.

Run: ``pytest benchmarks/bench_activation.py``. The model has the shape of a 5 M Llama, random weights, and every token
counts, which is the dearest case. Passes are without logits but the last of each sequence, in both cases. The probe's
memory must not grow with the number of batches. Other work on the machine disturbs both contenders in turn; compare
their least times.
"""

import pytest
import torch
from peak_memory import peak_mib

from sparse_cl.models.passes import stream
from sparse_cl.probes.activation import ActivationProbe

transformers = pytest.importorskip("transformers")

SEQUENCES, LENGTH, VOCABULARY = 16, 256, 4096
CASE = f"{SEQUENCES} x {LENGTH} tokens"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


def batches(count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def forward(model, count):
    stream(model, [], batches(count), tokens="all")


def probe(model, count):
    return ActivationProbe(model, tokens="all").run(batches(count))


CONTENDERS = {"forward passes": forward, "ActivationProbe": probe}


@pytest.mark.parametrize("contender", CONTENDERS)
def test_two_batches(benchmark, model, contender):
    run = CONTENDERS[contender]
    benchmark.pedantic(run, args=(model, 2), rounds=9, warmup_rounds=1)
    benchmark.group = CASE
    benchmark.extra_info.update(case=CASE, contender=contender, baseline="forward passes")


@pytest.mark.parametrize("count", [10, 100])
def test_peak_memory(benchmark, model, count):
    probe(model, 1)
    case = f"{count} batches"
    peak = benchmark.pedantic(lambda: peak_mib(lambda: probe(model, count)), rounds=1)
    benchmark.group = case
    benchmark.extra_info.update(
        case=case, contender="ActivationProbe, memory", baseline="none", peak_mib=round(peak, 1)
    )
