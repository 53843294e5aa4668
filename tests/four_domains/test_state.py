"""What counts as state: counted by hand for methods that hold much, little, and nothing beside their optimizer."""

from __future__ import annotations

import pytest
import torch
from cases.methods import domain, learn

from benchmarks.arena import EWC, Single
from sparse_cl.four_domains.state import state_bytes
from sparse_cl.methods import METHODS, AdamW, Elastic, ElasticLoRA, Orthogonal


def begun(method, model):
    """One domain learned, the next one begun and one step made: the optimizer."""
    model = learn(method, model, domain(0), steps=2)
    model = method.before_domain(model, domain(1))
    optimizer = method.make_optimizer(model, 1e-3)
    model(**domain(1)[0]).loss.backward()
    optimizer.step()
    return optimizer


def numbers(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_adamw_has_two_moments_and_a_count_a_parameter(tiny_llama):
    optimizer = begun(method := AdamW(), tiny_llama)
    assert state_bytes(method, optimizer) == 8 * numbers(tiny_llama) + 4 * len(list(tiny_llama.parameters()))


def test_what_a_method_holds_counts_once(tiny_llama):
    moments = 8 * numbers(tiny_llama)
    counts = 4 * len(list(tiny_llama.parameters()))
    optimizer = begun(method := Single(), tiny_llama)
    assert state_bytes(method, optimizer) >= moments + counts + 4 * numbers(tiny_llama)

    optimizer = begun(method := Elastic(), tiny_llama)
    # Of a matrix each row has one second moment.
    moments = 4 * sum(p.numel() + (len(p) if p.dim() == 2 else p.numel()) for p in tiny_llama.parameters())
    # Beside moments: how far each weight (m, n) has moved in r directions; of each input, shared by the layers that
    # read it, these directions and how much each is used.
    memory = method.memory
    subspaces = {name: memory.subspace(name) for name in memory.names}
    moved = sum(memory.shape(name)[0] * subspace.rank for name, subspace in subspaces.items())
    inputs = {id(subspace): subspace for subspace in subspaces.values()}
    assert len(inputs) == 9
    held = sum((subspace.width + 1) * subspace.rank for subspace in inputs.values())
    # And of the embedding how far the used rows have moved, and how often each row is looked up.
    table = tiny_llama.get_input_embeddings().weight
    rows = len(memory.used_rows(table).index) * table.shape[1] + len(table)
    assert state_bytes(method, optimizer) == pytest.approx(moments + counts + 4 * (moved + held + rows), rel=0.01)


def test_a_penalty_counts_its_fisher_and_its_anchor(tiny_llama):
    optimizer = begun(method := EWC(), tiny_llama)
    assert state_bytes(method, optimizer) == pytest.approx(16 * numbers(tiny_llama), rel=0.01)


def test_bases_count_and_copies_for_the_leak_do_not(tiny_llama):
    optimizer = begun(method := Orthogonal(), tiny_llama)
    kept = method.memory.nbytes()
    assert kept > 0
    assert state_bytes(method, optimizer) == optimizer.state_bytes() + kept


def test_earlier_adapters_count(tiny_llama):
    method, sizes, model = ElasticLoRA(), [], tiny_llama
    for number in range(3):
        model = method.before_domain(model, domain(number))
        sizes.append(state_bytes(method, torch.optim.SGD(model.parameters())))
        method.after_domain(model, domain(number))
    adapter = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes[2] - sizes[1] >= adapter


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.kind == "ours"])
def test_no_method_of_ours_holds_the_model_or_data(tiny_llama, name):
    """Three copies of the weights, moments of inputs and a small rest at most."""
    torch.manual_seed(0)
    optimizer = begun(method := METHODS[name](), tiny_llama)
    assert state_bytes(method, optimizer) < 40 * numbers(tiny_llama)
