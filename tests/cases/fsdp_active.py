"""Checks of ActiveLinear: layers that fully_shard has split learn as in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from sparse_cl import ColumnMask, ElasticAdamW, RowMask, SparseMaskedAdamW, Subspace, SubspaceProjectedAdamW
from sparse_cl.nn import ActiveLinear, activate, restore, write_back

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


def train(net, optimizer, ranks=1, steps=3, first=0, dtype=torch.float64):
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
    "by row": lambda params: SparseMaskedAdamW(params, lr=1e-2, second_moment="row"),
    "hard": elastic(),
    "pull": elastic(strength=5.0),
    "budget": elastic(budget=1e-3),
    "later": elastic(every=2, budget=1e-3),
}


def active_layers_learn_as_in_one_process(folder):
    flat = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for name, make in OPTIMIZERS.items():
        for mesh in (flat, square) if name in ("plain", "budget") else (flat,):
            one, net = active(), active(mesh)
            made = [make(list(m.named_parameters())) for m in (one, net)]
            train(one, made[0])
            train(net, made[1], 4)
            assert_like(net, one)
            if hasattr(made[0], "old_output_drift"):
                drifts = [optimizer.old_output_drift() for optimizer in made]
                assert drifts[1] == pytest.approx(drifts[0], rel=1e-9, abs=1e-15) and drifts[0]


CHECKS = [active_layers_learn_as_in_one_process]
