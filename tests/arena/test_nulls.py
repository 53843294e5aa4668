"""The nulls of the pull: what they keep of it, and what they know less."""

from __future__ import annotations

import pytest
import torch
from cases.methods import copy_of, domain, learn

from benchmarks.arena import ElasticNull
from sparse_cl import ElasticAdamW
from sparse_cl.methods import Elastic


def directions(method, model):
    """Each weight's directions and strengths, of the optimizer that a method makes for a second domain."""
    torch.manual_seed(0)
    optimizer = method.make_optimizer(method.before_domain(model, domain(1)), 1e-3)
    return {param: fit.whole for param, fit in optimizer._projections.items() if fit.whole.rank}


@pytest.mark.parametrize("null", ["directions", "strengths", "one"])
def test_a_null_differs_in_what_it_says_alone(tiny_llama, null):
    made = {}
    for name, method in (("pull", Elastic()), ("null", ElasticNull(null=null))):
        model = learn(method, copy_of(tiny_llama), domain(0))
        made[name] = list(directions(method, model).values())
    assert len(made["pull"]) == len(made["null"]) > 5
    changed = 0
    for pull, other in zip(made["pull"], made["null"], strict=True):
        assert (pull.rank, pull.width) == (other.rank, other.width)
        assert torch.equal(pull.basis, other.basis) == (null != "directions" or pull.basis.numel() == 0)
        torch.testing.assert_close(pull.values.sum(), other.values.sum())
        if null != "one":
            torch.testing.assert_close(pull.values.sort().values, other.values.sort().values)
        changed += not torch.equal(pull.values, other.values)
    assert changed == 0 if null == "directions" else changed > 3


def test_the_null_of_moments_is_the_pull_with_adamw_s(tiny_llama):
    method = ElasticNull(null="moments")
    model = learn(method, copy_of(tiny_llama), domain(0))
    optimizer = method.make_optimizer(method.before_domain(model, domain(1)), 1e-3)
    assert type(optimizer) is ElasticAdamW and optimizer.protects
    assert {group["second_moment"] for group in optimizer.param_groups} == {"entry"}


def test_a_null_forgets_more_than_the_pull(tiny_llama):
    kept = []
    for method in (Elastic(strength=50.0), ElasticNull(strength=50.0, null="directions")):
        model = learn(method, copy_of(tiny_llama), domain(0), steps=12, lr=3e-3)
        before = loss(model)
        kept.append(loss(learn(method, model, domain(1), steps=12, lr=3e-3)) - before)
    assert kept[0] < kept[1]
    with pytest.raises(ValueError, match="null: expected 'directions', 'strengths', 'one', 'moments', got 'none'"):
        ElasticNull(null="none")


@torch.no_grad()
def loss(model):
    return sum(float(model(**batch).loss) for batch in domain(0))
