from __future__ import annotations

import json

import pytest
import torch

from sparse_cl.probes.curvature import Curvature, Factors, curvature_overlap
from sparse_cl.report.sections.curvature import section


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(a, s):
    return Factors(a, s, *(torch.linalg.eigvalsh(m).flip(0).clamp(min=0) for m in (a, s)))


def record(spectrum, turns, tokens=4000):
    """Two layers of 40 inputs and 30 outputs in each domain, with this spectrum along the columns of its turn."""
    domains = {}
    for domain, seed in turns.items():
        u, v = (torch.linalg.qr(normal(seed + i, n, n))[0] for i, n in enumerate((40, 30)))
        one = factors(u * spectrum(40) @ u.T, v * spectrum(30) @ v.T)
        one = Factors(one.inputs, one.outputs, one.input_values, one.output_values, (one, one))
        domains[domain] = Curvature({"first": one, "second": one}, tokens, 1)
    found = {"domains": {name: domain.to_json() for name, domain in domains.items()}}
    if len(domains) > 1:
        found["overlap"] = curvature_overlap(domains, share=0.1)
    return json.loads(json.dumps(found, allow_nan=False))


def steep(n):
    return 10 ** torch.linspace(0, -8, n, dtype=torch.float64)


def level(n):
    return torch.ones(n, dtype=torch.float64)


def test_flat_models_are_said_to_be_flat():
    found = record(steep, {"code": 0, "math": 0})
    share = found["domains"]["code"]["layers"]["first"]["flat"][3]
    text = section(found).sentence
    assert share > 0.8
    assert f"{share:.1%} of the directions of a weight are flat (code {share:.1%}, math {share:.1%})" in text
    assert "at 0.001 of the largest eigenvalue; of white noise 0.0% would be." in text
    assert "two domains share 1.00 (chance 0.10, ceiling 1.00)" in text


def test_models_without_flat_directions_are_said_to_have_none():
    found = section(record(level, {"code": 0, "math": 7}))
    assert " 0.0% of the directions of a weight are flat" in found.sentence
    assert "so nothing is flatter than chance" in found.sentence
    assert "carried by 100.00% of the directions" in found.sentence


def test_directions_that_are_not_shared_are_said_not_to_be():
    text = section(record(steep, {"code": 0, "math": 7, "art": 14})).sentence
    shared = float(text.split("two domains share ")[1].split(" ")[0])
    assert shared == pytest.approx(0.1, abs=0.1)


def test_a_single_domain_has_no_overlap():
    found = section(record(steep, {"code": 0}))
    assert "share" not in found.sentence.split(". ")[-1] and "Shared" not in found.note
    assert len(found.table.rows) == 2 and len(found.figures[0].axes) == 3


def test_too_few_tokens_show_in_the_null():
    # Ten tokens span at most 10 of 40 inputs and 10 of 30 outputs.
    text = section(record(steep, {"code": 0}, tokens=10)).sentence
    assert f"of white noise {1 - 10 * 10 / (40 * 30):.1%} would be" in text
