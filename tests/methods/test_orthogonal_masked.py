"""Orthogonal updates of some neurons: outside old directions, and outside nothing but these neurons."""

from __future__ import annotations

import pytest
import torch
import transformers
from cases.methods import domain, learn, weights

from sparse_cl.methods import OrthogonalMasked, SparseMasked
from sparse_cl.nn import restore


@pytest.mark.parametrize("energy", [0.6, 0.8])
def test_updates_keep_out_of_old_directions_and_out_of_other_neurons(tiny_llama, energy):
    method = OrthogonalMasked(fraction=0.5, energy=energy)
    model = learn(method, tiny_llama, domain(0))
    bases = {name: method.memory.basis(name).double() for name in method.memory.names}
    before = weights(model)
    chosen = SparseMasked(fraction=0.5)
    chosen.before_domain(model, domain(1))
    restore(model)
    model = learn(method, model, domain(1), steps=50)
    record = method.record()["layers"]
    moved = 0
    for name, after in weights(model).items():
        change = after.double() - before[name].double()
        if name not in chosen.masks:
            assert torch.equal(after, before[name])
            continue
        outside = ~chosen.masks[name].to_dense()
        assert torch.equal(after[outside], before[name][outside])
        total = float(change.square().sum())
        leak = float((change @ bases[name]).square().sum()) / total if total else 0.0
        assert leak <= 1e-6
        assert record[name]["leak"] == pytest.approx(leak, rel=0.05, abs=1e-12)
        assert bases[name].shape[1] > 0
        moved += total > 1e-4
    assert moved >= 4
    assert set(record) == {*chosen.masks, "model.layers.0.mlp", "model.layers.1.mlp"}


def test_columns_with_no_more_room_than_old_directions_are_left(tiny_llama):
    method = OrthogonalMasked(fraction=3 / 24, energy=0.95)
    model = learn(method, tiny_llama, domain(0))
    before = weights(model)
    used = {name: method.memory.rank(name) for name in before if "down_proj" in name}
    after = weights(learn(method, model, domain(1)))
    full = [name for name, rank in used.items() if rank >= 3]
    assert full
    assert all(torch.equal(after[name], before[name]) for name in full)


def test_a_model_whose_inputs_cannot_be_followed_is_refused():
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="is a Conv1D.*orthogonal-masked needs"):
        OrthogonalMasked().check(model)
