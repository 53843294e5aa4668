from __future__ import annotations

import math

import pytest
import torch

from benchmarks.arena.studies import scale_section
from benchmarks.arena.studies.summary import summary
from sparse_cl.probes import ActivationProbe, GradientProbe, compare_gradients, overlap


@pytest.fixture
def probed(tiny_llama):
    batches = {}
    for number, domain in enumerate(("code", "math", "art")):
        ids = torch.randint(1, 256, (8, 12), generator=torch.Generator().manual_seed(number))
        batches[domain] = [{"input_ids": part} for part in ids.split(2)]
    activations = {domain: ActivationProbe(tiny_llama).run(own) for domain, own in batches.items()}
    gradients = {domain: GradientProbe(tiny_llama).run(own) for domain, own in batches.items()}
    record = {
        "activation": {domain: found.to_json() for domain, found in activations.items()},
        "overlap": overlap(activations).to_json(),
        "cosines": compare_gradients(gradients).to_json(),
    }
    return tiny_llama, record, activations, gradients


@pytest.mark.filterwarnings("ignore:.*wide")
def test_the_numbers_are_means_over_pairs_and_layers(probed):
    model, record, activations, gradients = probed
    found = summary("tiny", model, record)
    assert (found["model"], found["family"], found["width"], found["layers"]) == ("tiny", "llama", 16, 2)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    cosines = [
        float(
            torch.nn.functional.cosine_similarity(gradients[a].layers[n].flatten(), gradients[b].layers[n].flatten(), 0)
        )
        for n in gradients["code"].layers
        for a, b in (("code", "math"), ("code", "art"), ("math", "art"))
    ]
    assert len(cosines) == 42
    assert found["cosine"]["mean"] == pytest.approx(sum(cosines) / 42, abs=1e-5)
    assert found["cosine"]["absolute"] == pytest.approx(sum(map(abs, cosines)) / 42, abs=1e-5)
    sizes = [layer.numel() for layer in gradients["code"].layers.values()]
    assert found["cosine"]["null"] == pytest.approx(sum(math.sqrt(2 / math.pi / d) for d in sizes) / len(sizes))
    # One of 24 neurons is the top 5 %.
    tops = {
        domain: [int(mean.argmax()) for mean in a.mean(massive=False).values()] for domain, a in activations.items()
    }
    same = [tops[a][i] == tops[b][i] for a, b in (("code", "math"), ("code", "art"), ("math", "art")) for i in range(2)]
    assert found["overlap"]["iou"] == pytest.approx(sum(same) / 6)
    assert found["overlap"]["null"] == pytest.approx(1 / 47)
    needed = [share for a in activations.values() for share in a.needed(0.99).values()]
    assert found["sparsity"]["needed"] == pytest.approx(sum(needed) / len(needed))
    assert found["capacity"] is None and 0 < found["superposition"]["mean"] < found["superposition"]["null"] * 1.5 < 1.5
    layers = {"a": {"width": 8, "used": [1, 2], "used_null": [1, 4]}, "b": {"width": 4, "used": [1], "used_null": [2]}}
    assert summary("tiny", model, {"capacity": {"layers": layers}})["capacity"] == {"used": 0.25, "null": 0.5}
    assert scale_section.section([found]).table.rows[0][0] == "tiny"


def test_the_null_of_a_mean_cosine_is_that_of_random_directions():
    entries = 400
    draws = torch.randn(4000, 2, entries, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = torch.nn.functional.cosine_similarity(draws[:, 0], draws[:, 1], 1).abs().mean()
    assert float(seen) == pytest.approx(math.sqrt(2 / (math.pi * entries)), rel=0.03)


def test_what_was_not_probed_is_none(tiny_llama):
    found = summary("tiny", tiny_llama, {})
    assert (found["overlap"], found["cosine"], found["sparsity"]) == (None, None, None)
