from __future__ import annotations

import pytest
from cases.methods import copy_of, domain, learn, same, weights

from benchmarks.arena import Joint, Single
from sparse_cl.methods import METHODS, AdamW


@pytest.mark.parametrize("resumed", [False, True])
def test_every_domain_starts_from_the_base_bit_for_bit(tiny_llama, tmp_path, resumed):
    base, fresh = weights(tiny_llama), copy_of(tiny_llama)
    method, model = Single(), tiny_llama
    model = learn(method, model, domain(0), folder=tmp_path)
    assert not same(weights(model), base)
    if resumed:
        method = Single()
        model = method.restore(copy_of(fresh), [tmp_path])
    model = method.before_domain(model, domain(1))
    assert same(weights(model), base)
    model = learn(method, model, domain(1))
    assert same(weights(model), weights(learn(AdamW(), fresh, domain(1))))


def test_bounds_are_told_from_methods():
    assert {name for name, method in METHODS.items() if method.kind == "bound"} == {Single.name, Joint.name}
