from __future__ import annotations

import json

import torch

from sparse_cl.probes.gradient_cosines import compare_gradients
from sparse_cl.probes.gradients import GradientProbe
from sparse_cl.probes.interference import interference
from sparse_cl.report.sections.gradients import section


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def records(means, noise=0.02, step=1e-3):
    """Records of a model with a layer per kind, whose domains have these mean gradients in both layers."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(30, 20, bias=False, dtype=torch.float64) for name in "uv"})

    def loss(model, batch):
        return sum((layer.weight * part).sum() for layer, part in zip(model.values(), batch, strict=True)) + 100, 1

    batches = {
        domain: [[m + noise * normal(100 * i + 10 * j + k, 20, 30) for k in range(2)] for j in range(8)]
        for i, (domain, m) in enumerate(means.items())
    }
    modules = dict(model.items())
    gradients = {domain: GradientProbe(model, modules, loss=loss).run(own) for domain, own in batches.items()}
    risen = interference(model, batches, gradients, modules=modules, loss=loss, step=step)
    pair = compare_gradients(gradients, rank=2).to_json(), risen.to_json()
    return json.loads(json.dumps(pair, allow_nan=False))


def unit(seed):
    m = normal(seed, 20, 30)
    return m / m.norm()


def test_domains_that_share_directions_are_said_to():
    shared = unit(0)
    found = section(*records({"code": shared, "math": shared + 0.5 * unit(1), "art": -shared}))
    assert "between code and art (null ±0.06, ceiling" in found.sentence and "the largest of 3 pairs" in found.sentence
    assert "6 of 6 cosines lie outside the isotropic null" in found.sentence
    assert "so the layers' gradients are not independent random directions" in found.sentence
    # What helps code hurts art, and the other way round.
    assert "it raises another domain's loss in 4 of 6 cases" in found.sentence
    assert len(found.figures) == 2
    assert [row[0] for row in found.table.rows] == ["code – math", "code – art", "math – art"]


def test_unrelated_domains_are_said_to_be():
    found = section(*records({"code": unit(0), "math": unit(1)}, noise=0.001))
    assert "so domains do not share directions more than isotropic gradients do" in found.sentence
    assert "0 of 2 cosines lie outside" in found.sentence


def test_the_numbers_are_the_records():
    cosines, risen = records({"code": unit(0), "math": unit(0) + unit(1)})
    found = section(cosines, risen)
    value, low, high = (cosines["model"][key][0] for key in ("cosine", "low", "high"))
    assert f"is {value:.2f} [{low:.2f}, {high:.2f}] between code and math" in found.sentence
    assert found.table.rows[0][1] == f"{value:.3f}"
    own = 100 * (risen["relative"][0][0] + risen["relative"][1][1]) / 2
    assert f"its own loss by −{abs(own):.2g} %" in found.sentence


def test_without_interference_and_without_gradients():
    cosines, _ = records({"code": unit(0), "math": unit(1)})
    alone = section(cosines)
    assert len(alone.figures) == 1 and "Interference" not in alone.note and "step" not in alone.sentence
    model = cosines["model"]
    for part in (model, *cosines["layers"].values()):
        for key in ("cosine", "low", "high", "ceiling", "corrected", "overlap", "overlap_null"):
            part[key] = [None]
    assert section(cosines).sentence == "No pair of domains has gradients to compare: they are zero."


def test_many_pairs_are_not_all_drawn_but_all_told():
    cosines, risen = records({f"d{i}": unit(i) for i in range(6)})
    found = section(cosines, risen)
    assert len(found.table.rows) == 15
    assert "3 more pairs are in the table" in found.figures[0].get_supxlabel()
