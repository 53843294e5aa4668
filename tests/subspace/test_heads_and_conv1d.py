"""Layers that are not as others: heads that are embeddings too, and Conv1D, whose weight is transposed."""

import pytest
import torch
from cases.families import FAMILIES, make
from cases.methods import domain, inputs_of

from sparse_cl import ElasticAdamW, SubspaceMemory, SubspaceProjectedAdamW

HEAD = "transformer.wte.weight"
CONV1D = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def batches(number):
    """Of the tiny vocabulary; no two domains share a token."""
    found = []
    for batch in domain(number):
        ids = batch["input_ids"] % 20 + 20 * number
        found.append({**batch, "input_ids": ids, "labels": ids.masked_fill(batch["attention_mask"] == 0, -100)})
    return found


@pytest.fixture
def model():
    return make("GPT2", FAMILIES["GPT2"])


def remember(model, seen, **settings):
    memory = SubspaceMemory(model, source="inputs", **settings)
    for batch in seen:
        with torch.no_grad(), memory.watch(batch["attention_mask"]):
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        memory.observe()
    memory.consolidate()
    return memory


def train(model, optimizer, seen, steps=8):
    for step in range(steps):
        model(**seen[step % len(seen)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def layers():
    """(weight's name, layer's name, whether it is transposed) of all that have inputs."""
    blocks = [f"transformer.h.{i}.{name}" for i in range(2) for name in CONV1D]
    return [(f"{name}.weight", name, True) for name in blocks] + [(HEAD, "lm_head", False)]


def test_a_memory_knows_what_goes_into_them(model):
    seen = batches(0)
    memory = remember(model, seen, energy=0.9)
    assert memory.names == [name for name, _, transposed in layers()]
    assert memory.embeddings == [HEAD, "transformer.wpe.weight"]
    for weight, layer, transposed in layers():
        rows = inputs_of(model, layer, seen).double()
        values, vectors = torch.linalg.eigh(rows.mT @ rows / len(rows))
        subspace = memory.subspace(weight)
        assert subspace.width == rows.shape[1] and memory.is_transposed(weight) == transposed
        torch.testing.assert_close(subspace.values.double(), values.flip(0)[: subspace.rank], rtol=1e-4, atol=1e-5)
        overlap = torch.linalg.svdvals(subspace.basis.double().mT @ vectors.flip(1)[:, : subspace.rank])
        assert 0 < subspace.rank < subspace.width and overlap.min() > 0.999


def test_gradients_of_a_transposed_weight_span_what_its_inputs_do(model):
    seen = batches(0)
    memory = SubspaceMemory(model, energy=1.0)
    model(**seen[0]).loss.backward()
    memory.observe()
    memory.consolidate()
    inputs = remember(model, seen[:1], energy=1.0)
    for weight, _, transposed in layers():
        if transposed:
            assert memory.basis(weight).shape[0] == model.get_parameter(weight).shape[0]
            assert inputs.share_inside(weight, model.get_parameter(weight).grad) == pytest.approx(1, abs=1e-5)
    assert max(memory.surviving().values()) <= 1e-5


def moved(model, before, seen):
    """By weight ΔW, as (outputs, inputs), and E‖ΔW x‖² over these inputs of its layer."""
    found = {}
    for weight, layer, transposed in layers():
        change = model.get_parameter(weight).detach().double() - before[weight].double()
        change = change.mT if transposed else change
        found[weight] = change, float((seen[layer] @ change.mT).square().sum() / len(seen[layer]))
    return found


@pytest.mark.parametrize("budget", [None, 1e-4, 0.0])
def test_old_outputs_stay_within_the_bound(model, budget):
    """E‖ΔW x‖² is what the kept directions see, of which the optimizer tells, and at most τ ‖ΔW‖²."""
    old = batches(0)
    memory = remember(model, old, energy=0.95)
    seen = {layer: inputs_of(model, layer, old).double() for _, layer, _ in layers()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if budget is None:
        optimizer = SubspaceProjectedAdamW(model.named_parameters(), lr=3e-3, memory=memory, rest="train")
    else:
        optimizer = ElasticAdamW(model.named_parameters(), lr=3e-3, memory=memory, budget=budget)
    train(model, optimizer, batches(1))
    for weight, (change, energy) in moved(model, before, seen).items():
        subspace = memory.subspace(weight).to(dtype=torch.float64)
        start = before[weight].double() if weight == HEAD else before[weight].double().mT
        held = float((start @ subspace.basis).square().sum(0) @ subspace.values)
        inside = float((change @ subspace.basis).square().sum(0) @ subspace.values)
        assert change.norm() > 1e-3
        assert inside <= (budget or 0) * held * (1 + 1e-4) + 1e-7 * held
        assert energy <= inside + subspace.outside * float(torch.linalg.matrix_norm(change, 2)) ** 2 * (1 + 1e-4)
        if budget:
            assert optimizer.old_output_drift()[weight] == pytest.approx(inside / held, rel=1e-3)
    assert not torch.equal(model.transformer.wpe.weight, before["transformer.wpe.weight"])


@pytest.mark.parametrize("optimizer", [SubspaceProjectedAdamW, ElasticAdamW])
def test_a_tied_head_is_frozen_with_the_rest(model, optimizer):
    """Protected as a head it would still move as an embedding."""
    memory = remember(model, batches(0), energy=0.9)
    given = {} if optimizer is SubspaceProjectedAdamW else {"budget": 1e-3}
    opt = optimizer(model.named_parameters(), lr=1e-2, memory=memory, rest="freeze", **given)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, opt, batches(1), steps=2)
    moving = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moving == {name for name, _, transposed in layers() if transposed}
    assert HEAD in opt.rest
    assert not moving & set(opt.rest)


def test_a_tied_head_that_is_trained_is_protected_as_a_head(model):
    memory = remember(model, batches(0), energy=0.95)
    opt = ElasticAdamW(model.named_parameters(), lr=1e-2, memory=memory, budget=1e-5)
    held = {HEAD, "transformer.wpe.weight"}
    assert held <= set(opt.projections) and not held & set(opt.rest)
    assert "transformer.ln_f.weight" in opt.rest
    free = ElasticAdamW(model.named_parameters(), lr=1e-2, memory=memory, budget=1e-5, row_strength=0)
    assert {"transformer.wpe.weight", "transformer.ln_f.weight"} <= set(free.rest)


@pytest.mark.parametrize("form", ["loaded", "copied"])
def test_the_kind_of_a_layer_is_saved_with_it(model, tmp_path, form):
    memory = remember(model, batches(0), energy=0.9)
    memory.save(tmp_path / "memory.safetensors")
    unbound = SubspaceMemory.load(tmp_path / "memory.safetensors")
    opts = []
    for known in (memory, unbound):
        other = make("GPT2", FAMILIES["GPT2"])
        if form == "copied" and known is unbound:
            known.bind(other)
        params = model if known is memory else other
        opts.append(ElasticAdamW(params.named_parameters(), lr=1e-2, memory=known, strength=2.0))
        train(params, opts[-1], batches(1), steps=2)
    assert opts[0].rest == opts[1].rest
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
