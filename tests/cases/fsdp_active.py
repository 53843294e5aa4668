"""Checks of ActiveLinear: layers that fully_shard has split learn as in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from sparse_cl import ColumnMask, ElasticAdamW, RowMask, SparseMaskedAdamW, Subspace, SubspaceProjectedAdamW, protect
from sparse_cl.nn import activate, restore, write_back

from .fsdp_checkpoints import load, save
from .rules import basis, energies

N = basis().shape[0]
#: Rows that 4 processes share unevenly, and a layer of which some hold no active row; columns; and gains.
MASKS = {
    "0.weight": RowMask([0, 1, 2, 7, 8], (9, N), gain=[0.5, 1.0, 2.0, 0.25, 1.5]),
    "2.weight": ColumnMask([1, 2, 6], (6, 9), gain=[0.5, 1.0, 2.0]),
    "4.weight": RowMask([N - 1], (N, 6)),
}


def model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(N, 9), nn.Tanh(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, N)).to(dtype)


def active(mesh=None, dtype=torch.float64, masks=None, leaf_dtype=None, **options):
    net = model(dtype)
    activate(net, MASKS if masks is None else masks, leaf_dtype=leaf_dtype)
    if mesh is not None:
        fully_shard(net[0], mesh=mesh, **options)
        fully_shard([net[2], net[4]], mesh=mesh, **options)
        fully_shard(net, mesh=mesh, **options)
    return net


def batch(of, ranks, dtype):
    inputs = torch.randn(8, N, generator=torch.Generator().manual_seed(of)).to(dtype)
    return inputs if ranks == 1 else inputs.chunk(ranks)[dist.get_rank()]


def train(net, optimizer, ranks=1, steps=2, first=0, dtype=torch.float64):
    for i in range(first, first + steps):
        inputs = batch(i, ranks, dtype)
        (net(inputs) - inputs).square().mean().backward()
        optimizer.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()


def wholes(net):
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in net.named_parameters()}


def assert_like(net, one, rtol=0, atol=1e-12):
    ours, theirs, begun = wholes(net), wholes(one), wholes(model(one[0].weight.dtype))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
        if name in begun:
            changed = ours[name] != begun[name]
            frozen = ~MASKS[name].to_dense() if name in MASKS else torch.ones_like(changed)
            assert not (changed & frozen).any() and (name not in MASKS or changed.any()), name


def elastic(every=1, **rule):
    def make(params):
        memory = {"0.weight": Subspace(basis().double(), energies().double())}
        memory["2.weight"] = Subspace(torch.eye(9, dtype=torch.float64)[:, :3], torch.tensor([3.0, 2.0, 1.0]).double())
        memory["4.weight"] = Subspace(torch.eye(6, dtype=torch.float64)[:, 2:4])
        if not rule:
            return SubspaceProjectedAdamW(params, lr=1e-2, memory=memory)
        return ElasticAdamW(params, lr=1e-2, memory=memory, every=every, **rule)

    return make


OPTIMIZERS = {
    "plain": lambda params: SparseMaskedAdamW(params, lr=1e-2),
    "hard": elastic(),
    "pull": elastic(strength=5.0),
    "budget": elastic(budget=1e-3),
    "later": elastic(every=2, budget=1e-3),
}


def active_layers_learn_as_in_one_process(folder):
    flat = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for name, make in OPTIMIZERS.items():
        for mesh in (square,) if name == "pull" else (flat,):
            one, net = active(), active(mesh)
            made = [make(list(m.named_parameters())) for m in (one, net)]
            train(one, made[0])
            train(net, made[1], 4)
            assert_like(net, one)
            if hasattr(made[0], "old_output_drift"):
                drifts = [optimizer.old_output_drift() for optimizer in made]
                assert drifts[1] == pytest.approx(drifts[0], rel=1e-9, abs=1e-15) and drifts[0]


def dtypes_and_policies(folder):
    """Leaves are in more digits than their weights, or in as many; weights are the rounded leaves everywhere."""
    mesh = init_device_mesh("cpu", (4,))
    halves = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    cases = (
        (torch.bfloat16, None, {}),
        (torch.bfloat16, torch.bfloat16, {}),
        (torch.float32, None, {"mp_policy": halves}),
        (torch.float32, None, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    )
    for dtype, leaf_dtype, options in cases:
        one, net = (active(at, dtype, leaf_dtype=leaf_dtype, **more) for at, more in ((None, {}), (mesh, options)))
        train(one, SparseMaskedAdamW(one.named_parameters(), lr=1e-2), dtype=dtype)
        train(net, SparseMaskedAdamW(net.named_parameters(), lr=1e-2), 4, dtype=dtype)
        exact = "offload_policy" in options
        assert_like(net, one, atol=1e-6 if exact else 2e-2)
        found = wholes(net)
        for name, mask in MASKS.items():
            leaf = found[name.replace("weight", "active")]
            assert leaf.dtype == (leaf_dtype or torch.promote_types(dtype, torch.float32))
            own = found[name][mask.to_dense()].view(leaf.shape)
            assert torch.equal(own, leaf.to(dtype)) and leaf.dtype == dtype or (own != leaf).any()


def another_optimizer_writes_back(folder):
    one, net = active(), active(init_device_mesh("cpu", (4,)))
    for model, ranks in ((one, 1), (net, 4)):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, foreach=False)
        optimizer.register_step_post_hook(lambda *_, model=model: write_back(model))
        optimizer.clip_grad_norm_ = lambda _: None
        train(model, optimizer, ranks)
    assert_like(net, one)


def loading_sets_the_leaves(folder):
    mesh = init_device_mesh("cpu", (4,))
    net = active(mesh, torch.bfloat16)
    before = wholes(net)
    state = net.state_dict()
    assert state.keys() == model().state_dict().keys()
    with torch.no_grad():
        net[0].active.to_local().mul_(1.0001)
    net.load_state_dict({name: value.clone() for name, value in state.items()})
    digits = wholes(net)["0.active"]
    assert torch.equal(digits, before["0.active"] * 1.0001), "the leaf rounds to what was loaded"
    net.load_state_dict({name: value + 1 for name, value in state.items()})
    after = wholes(net)
    for name, mask in MASKS.items():
        leaf = after[name.replace("weight", "active")]
        assert torch.equal(leaf, (before[name] + 1)[mask.to_dense()].view(leaf.shape).float())


def step(net, optimizer, seed):
    """By gradients that are the same for any number of processes."""
    for param in net.parameters():
        if param.requires_grad:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
            if isinstance(param, DTensor):
                param.grad = distribute_tensor(param.grad, param.device_mesh, param.placements, src_data_rank=None)
    optimizer.step()


def a_checkpoint_goes_on_in_2_1_and_4_processes(folder):
    flat, two = init_device_mesh("cpu", (4,)), DeviceMesh("cpu", [0, 1])

    def build(mesh, name):
        net = active(mesh, torch.bfloat16)
        return net, OPTIMIZERS[name](list(net.named_parameters()))

    for name, places in (("plain", (two, None, flat)), ("pull", (two,))):
        one, many, before = build(None, name), build(flat, name), "begun"
        for seed in range(2):
            step(*one, seed)
            step(*many, seed)
        save(*many, folder / name / before)
        for place in places:
            step(*one, 2)
            ranks = 1 if place is None else place.size()
            if dist.get_rank() < ranks:
                group, again = "none" if place is None else place.get_group(), build(place, name)
                load(*again, folder / name / before, group)
                step(*again, 2)
                save(*again, folder / name / str(ranks), group)
                ours = wholes(again[0])
                for key, value in wholes(one[0]).items():
                    torch.testing.assert_close(ours[key], value, rtol=0, atol=0 if name == "plain" else 1e-6)
            before = str(ranks)
            dist.barrier()
    # One process keeps what has moved of all rows of a weight, several what has of the rows of a leaf.
    with pytest.raises(dcp.api.CheckpointException, match="Size mismatch"):
        load(*build(None, "pull"), folder / "pull" / "begun", "none")
    with pytest.raises(ValueError, match="projection.moved: has 9 rows of a weight of 5 that is split"):
        many[1].load_state_dict(one[1].state_dict())


def what_cannot_work_is_refused(folder):
    mesh = init_device_mesh("cpu", (4,))
    split = fully_shard(model(), mesh=mesh)
    with pytest.raises(ValueError, match="call activate before fully_shard"):
        activate(split, MASKS)
    net = active(mesh)
    with pytest.raises(ValueError, match="fully_shard has split its active layers.* load it into one"):
        restore(net)
    optimizer = SparseMaskedAdamW(net.named_parameters())
    with pytest.raises(ValueError, match="'0.active' is of an ActiveLinear, which has a mask of its own"):
        optimizer.set_masks({"0.active": RowMask([1], (5, N))})
    train(net, optimizer, 4, 1)
    state = optimizer.state_dict()
    memory = {"0.active": Subspace(basis().double(), energies().double())}
    with pytest.raises(ValueError, match="'?0.active'? is the leaf of an ActiveLinear, which is written.*ElasticAdamW"):
        protect(torch.optim.AdamW(net.named_parameters()), memory, budget=0)

    # A pass without gradients leaves the root whole.
    alone = fully_shard(active(masks={"0.weight": MASKS["0.weight"]}), mesh=mesh)
    its = SparseMaskedAdamW(alone.named_parameters())
    alone(batch(0, 4, torch.float64)).sum().backward()
    with torch.no_grad():
        alone(batch(0, 4, torch.float64))
    with pytest.raises(ValueError, match="'0.active': its layer is gathered.*call model.reshard"):
        its.step()
    with pytest.raises(RuntimeError, match=r"call model.reshard\(\) first"):
        write_back(alone)
    alone.reshard()
    its.step()

    others = {**MASKS, "0.weight": RowMask([0, 1, 2, 7, 3], (9, N), gain=MASKS["0.weight"].gain)}
    other = active(mesh, masks=others)
    with pytest.raises(ValueError, match="'0.active': it was made under another mask than that of its ActiveLinear"):
        SparseMaskedAdamW(other.named_parameters()).load_state_dict(state)
    odd = active(mesh, masks=others if dist.get_rank() == 3 else MASKS)
    optimizer = SparseMaskedAdamW(odd.named_parameters())
    odd(batch(0, 4, torch.float64)).sum().backward()
    with pytest.raises(ValueError, match="processes differ: the mask of parameter '0.active' is"):
        optimizer.step()

    parallel = parallelize_module(active()[0], mesh, ColwiseParallel())
    with pytest.raises(RuntimeError, match="as tensor parallelism has it; expected it whole, as fully_shard gathers"):
        parallel(torch.zeros(4, N, dtype=torch.float64))
    ignoring = active()
    fully_shard(ignoring, mesh=mesh, ignored_params={ignoring[0].active})
    with pytest.raises(ValueError, match="'0.active' is the leaf of an ActiveLinear whose weight is split"):
        SparseMaskedAdamW(ignoring.named_parameters())


CHECKS = [
    active_layers_learn_as_in_one_process,
    dtypes_and_policies,
    another_optimizer_writes_back,
    loading_sets_the_leaves,
    a_checkpoint_goes_on_in_2_1_and_4_processes,
    what_cannot_work_is_refused,
]
