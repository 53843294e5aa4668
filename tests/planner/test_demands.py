"""State, gradients, activations and FLOPs of each method as planned, against the method itself on a small model."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from sparse_cl import SubspaceMemory
from sparse_cl.four_domains.state import optimizer_state_bytes
from sparse_cl.methods import METHODS
from sparse_cl.planner.activations import block_bytes, weight_dtype
from sparse_cl.planner.cost import Workload, attention_flops, cost, train_flops
from sparse_cl.planner.demands import demand
from sparse_cl.planner.devices import find_device
from sparse_cl.planner.shapes import shape_of_config

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # names inside peft

BATCH, LENGTH = 2, 24


def config(layers=2, tied=False, **changes):
    sizes = {
        "vocab_size": 90,
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
    }
    return transformers.LlamaConfig(**{**sizes, **changes})


def batch():
    ids = torch.randint(0, 90, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def prepared(name, of, dtype=torch.float32, attention="eager", **options):
    """A method on a real model of this configuration, ready to learn its first domain, and the model to train."""
    of = copy.deepcopy(of)
    of._attn_implementation = attention
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(of, dtype=dtype)
    method = METHODS[name](**options)
    return method, method.before_domain(model, [batch()]).train()


def test_every_method_is_planned():
    shape = shape_of_config(config(), "llama", torch.float32)
    assert [demand(name, shape).settings for name in METHODS] == [METHODS[name]().settings() for name in METHODS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_bytes_are_those_of_the_optimizer_after_a_step(name, tied, dtype):
    method, model = prepared(name, config(tied=tied), dtype)
    optimizer = method.make_optimizer(model, 1e-3)
    model(**batch()).loss.backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.step()
    planned = demand(name, shape_of_config(config(tied=tied), "llama", dtype))
    assert planned.state_bytes == optimizer_state_bytes(optimizer)
    assert planned.gradient_bytes == gradients
    # The leaves of active layers are in the optimizer's state, as masters.
    weights = [p for n, p in model.named_parameters() if not n.endswith(".active")]
    weights += [b for n, b in model.named_buffers() if "_osf_" in n]
    assert planned.weight_bytes == sum(w.nbytes for w in weights)


def test_state_of_a_model_with_biases_and_transposed_layers():
    of = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_inner=24, vocab_size=90)
    shape = shape_of_config(of, "gpt2", torch.float32)
    for name in ("adamw", "lora", "sparse-masked"):
        method, model = prepared(name, of)
        optimizer = method.make_optimizer(model, 1e-3)
        model(**batch()).loss.backward()
        optimizer.step()
        assert demand(name, shape).state_bytes == optimizer_state_bytes(optimizer), name


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_flops_are_those_that_torch_counts(name, layers):
    of = config(layers)
    _, model = prepared(name, of)
    with FlopCounterMode(display=False) as forward:
        loss = model(**batch()).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    shape = shape_of_config(of, "llama", torch.float32)
    planned, tokens = demand(name, shape), BATCH * LENGTH
    assert tokens * (planned.forward + attention_flops(shape, LENGTH)) == pytest.approx(
        forward.get_total_flops(), rel=0.02
    )
    total = tokens * train_flops(shape, planned, LENGTH, checkpointing=False) + planned.step_flops
    assert total == pytest.approx(forward.get_total_flops() + backward.get_total_flops(), rel=0.02)


def test_flops_with_checkpointing_are_those_that_torch_counts():
    of = config(3)
    _, model = prepared("adamw", of)
    model.gradient_checkpointing_enable()
    with FlopCounterMode(display=False) as counted:
        model(**batch(), use_cache=False).loss.backward()
    shape = shape_of_config(of, "llama", torch.float32)
    total = BATCH * LENGTH * train_flops(shape, demand("adamw", shape), LENGTH, checkpointing=True)
    assert total == pytest.approx(counted.get_total_flops(), rel=0.02)


def saved_bytes(model, precision):
    """Bytes of all storages that a forward pass keeps for the backward pass; weights and indices left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        other = storage.data_ptr() not in own and tensor.is_floating_point()
        if other and not any(tensor.shape == p.shape for p in model.parameters()):
            kept[storage.data_ptr()] = storage
        return tensor

    given = batch()
    del given["attention_mask"]  # without padding attention is fused
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"),
    ):
        loss = model(**given, use_cache=False).loss
    return sum(storage.nbytes() for storage in kept.values()) + 0 * loss.item()


@pytest.mark.parametrize(
    ("name", "precision", "tolerance"),
    [
        (name, precision, tolerance)
        for name in ("adamw", "lora", "sparse-masked", "sparse-masked-lora", "orthogonal")
        for precision, tolerance in (("fp32", 0.0), ("bf16", 0.0), ("mixed", 0.1))
    ]
    # Of its factors, which depend on no token, those are counted here that have another shape than all weights.
    + [("osf", "fp32", 0.02), ("osf", "bf16", 0.02)],
)
def test_activations_are_what_autograd_keeps(name, precision, tolerance):
    measured = []
    for layers in (2, 3):  # the difference is one block without what surrounds them
        _, model = prepared(name, config(layers), weight_dtype(precision), attention="sdpa")
        measured.append(saved_bytes(model, precision))
    shape = shape_of_config(config(3), "llama", weight_dtype(precision))
    planned = BATCH * LENGTH * block_bytes(shape.blocks[1], demand(name, shape), precision)
    assert planned == pytest.approx(measured[1] - measured[0], rel=tolerance)


KEPT = {
    "ewc": lambda method: [t for _, rest, fisher in method._springs for t in (rest, fisher)],
    "o-lora": lambda method: list(method._old.values()),
    "elastic": lambda method: [
        *(basis for basis, _ in method.usage.bases.values()),
        *(pull.anchor for pull in method._pulls.values()),
    ],
    "curvature": lambda method: [
        basis for p in method.projections.values() for basis in (p.curvature.row_basis, p.curvature.column_basis)
    ],
}


KEPT["elastic-lora"] = KEPT["elastic"]


@pytest.mark.parametrize(
    ("name", "options"),
    # Wider than the stream, narrower than the MLP.
    [*((name, {}) for name in KEPT), ("elastic", {"max_width": 40}), ("elastic-lora", {"max_width": 40})],
)
def test_what_protects_is_as_large_and_turns_as_much_as_planned(name, options):
    of = config()
    assert of.hidden_size <= 40 < of.intermediate_size
    method, model = prepared(name, of, **options)
    method.after_domain(model, [batch()])
    model = method.before_domain(model, [batch()]).train()
    kept = {t.data_ptr(): t.nbytes for t in KEPT[name](method) if t is not None}
    planned = demand(name, shape_of_config(of, "llama", torch.float32), **options)
    assert planned.kept_bytes + planned.kept_bytes_a_domain == sum(kept.values())

    optimizer = method.make_optimizer(model, 1e-3)
    loss, penalty = model(**batch()).loss, method.penalty(model)
    (loss if penalty is None else loss + penalty).backward()
    with FlopCounterMode(display=False) as counted:
        optimizer.step()
    if name == "curvature":  # as if every direction had curvature
        assert 0 < counted.get_total_flops() <= planned.turning_flops
    else:
        assert counted.get_total_flops() == planned.turning_flops


@pytest.mark.parametrize(("wide", "max_rank"), [(32, 3), (32, 30), (1100, 3)])
def test_memory_of_subspaces_is_what_it_holds(wide, max_rank):
    """Random inputs and all the energy: every domain takes as many directions as it may."""
    of = config(1, intermediate_size=wide)
    _, model = prepared("adamw", of)
    memory = SubspaceMemory(model, energy=1.0, source="inputs", max_rank=max_rank)
    rng = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            with memory.watch():
                memory.note(f"{name}.weight", torch.randn(64, module.in_features, generator=rng))
    memory.observe()
    observing = memory.nbytes()
    memory.consolidate()
    assert {memory.rank(name) for name in memory.names} == {max_rank}
    shape = shape_of_config(of, "llama", torch.float32)
    work = Workload(domains=1, precision="fp32", length=LENGTH, used=1.0)
    planned = cost("orthogonal", shape, work, find_device("h100"), max_rank=max_rank).memory
    assert planned.bases == memory.nbytes()
    assert planned.moments == observing


def test_unknown_methods_and_refused_options():
    shape = shape_of_config(config(), "llama", torch.float32)
    with pytest.raises(ValueError, match="unknown method 'sgd': expected adamw, lora"):
        demand("sgd", shape)
    with pytest.raises(ValueError, match="fraction: expected a share of the neurons"):
        demand("sparse-masked", shape, fraction=2.0)
    transposed = shape_of_config(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50), "gpt2")
    with pytest.raises(ValueError, match="orthogonal needs a model of torch.nn.Linear"):
        demand("orthogonal", transposed)
