"""`sparse-cl probe` against the plain passes that it needs: the same batches, no hooks, nothing kept.

Run: ``pytest benchmarks/bench_probe.py``. A Llama of 5.5 million parameters with random weights, two domains of eight
batches, 16 sequences of 256 tokens each, the last half of which are answers. Forward passes compute one logit row a
sequence; those of gradients, curvature and interference compute all, as they need them. What is done once at the end,
resampling and eigendecompositions, takes about 8 s whatever the number of batches: fewer of them make the ratio worse.
"""

import warnings

import pytest
import torch
import transformers

from sparse_cl.models.losses import answer_loss, mean_loss
from sparse_cl.models.parts import linear_layers
from sparse_cl.models.passes import stream
from sparse_cl.report.probe import probe_model
from sparse_cl.report.settings import PROBES, ProbeSettings

DOMAINS, BATCHES = ("a", "b"), 8


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def domains():
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name in DOMAINS:
        ids = [torch.randint(0, 4096, (16, 256), generator=generator) for _ in range(BATCHES)]
        made[name] = [
            {
                "input_ids": x,
                "attention_mask": torch.ones_like(x),
                "labels": x.clone().index_fill_(1, torch.arange(128), -100),
            }
            for x in ids
        ]
    return made


def forward(model, domains):
    for batches in domains.values():
        stream(model, [], batches)


def forward_and_backward(model, domains):
    weights = [layer.weight for layer in linear_layers(model).values()]
    for batches in domains.values():
        for batch in batches:
            loss, _ = answer_loss(model, batch)
            torch.autograd.grad(loss, weights)


def with_sampled_labels(model, domains):
    # A pass of its own: labels cost nothing, so any will do.
    forward_and_backward(model, domains)


def losses(model, domains):
    for _ in range(1 + len(domains)):
        for batches in domains.values():
            mean_loss(model, batches)


NEEDED = {
    "activation": (forward,),
    "rank": (forward,),
    "capacity": (forward, forward_and_backward),
    "gradients": (forward_and_backward, losses),
    "curvature": (with_sampled_labels,),
}


@pytest.mark.parametrize("probes", [("activation",), PROBES], ids=lambda x: "+".join(x))
@pytest.mark.parametrize("contender", ["plain passes", "probe"])
def test_probe(benchmark, model, domains, probes, contender):
    needed = dict.fromkeys(one for name in probes for one in NEEDED[name])

    def plain():
        for one in needed:
            one(model, domains)

    def probe():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            probe_model(model, domains, ProbeSettings(probes=probes, domains=DOMAINS))

    benchmark.extra_info |= {"case": ", ".join(probes), "contender": contender, "baseline": "plain"}
    short = probes != PROBES
    benchmark.pedantic(
        {"plain passes": plain, "probe": probe}[contender], rounds=3 if short else 1, warmup_rounds=int(short)
    )
