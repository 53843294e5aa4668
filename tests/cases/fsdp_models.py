"""Checks of SparseMaskedAdamW: models that fully_shard has split train as in one process."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from sparse_cl import ColumnMask, ElementMask, RowMask, SparseMaskedAdamW

MASKS = {
    "0.weight": RowMask([0, 4], (6, 8)),
    "0.bias": RowMask([0, 4], (6,)),
    "2.weight": ElementMask(torch.arange(30).view(5, 6) % 3 == 0),
    "4.weight": ColumnMask([1, 2], (8, 5)),
}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 8))


def sharded(mesh, **options):
    split = model()
    for layer in split:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(split, mesh=mesh, **options)


def tensor_parallel():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    split = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 8))
    split.load_state_dict(model().state_dict())
    split = parallelize_module(split, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(split, mesh=mesh["dp"])


def batch(of, ranks):
    """This process's part of a batch of 8, where so many processes each take a part."""
    inputs = torch.randn(8, 8, generator=torch.Generator().manual_seed(of))
    return inputs if ranks == 1 else inputs.chunk(ranks)[dist.get_rank() * ranks // 4]


def train(net, optimizer, ranks=4, steps=3):
    for i in range(steps):
        inputs = batch(i, ranks)
        (net(inputs) - inputs).square().mean().backward()
        optimizer.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()


def wholes(net):
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu() for n, p in net.named_parameters()}


def assert_like_one_process(split, ranks=4, rtol=1e-5, atol=1e-6):
    one = model()
    begun = copy.deepcopy(wholes(one))
    train(one, SparseMaskedAdamW(one.named_parameters(), lr=1e-2, masks=MASKS), ranks=1)
    train(split, SparseMaskedAdamW(split.named_parameters(), lr=1e-2, masks=MASKS), ranks)
    ours, theirs = wholes(split), wholes(one)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
        if name in MASKS:
            active = MASKS[name].to_dense()
            assert torch.equal(ours[name][~active], begun[name][~active])
            assert (ours[name] != begun[name])[active].all()


def fsdp2(folder):
    assert_like_one_process(sharded(init_device_mesh("cpu", (4,))))


def hsdp(folder):
    assert_like_one_process(sharded(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))))


def columns(folder):
    def placement(param):
        return Shard(1) if param.dim() == 2 else Shard(0)

    even = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
    begun = copy.deepcopy(even)
    fully_shard(even, mesh=init_device_mesh("cpu", (4,)), shard_placement_fn=placement)
    mask = ElementMask(torch.arange(32).view(4, 8) % 3 == 0)
    train(even, SparseMaskedAdamW(even.named_parameters(), masks={"0.weight": mask}))
    assert torch.equal(wholes(even)["0.weight"] != begun[0].weight, mask.to_dense())


def tensor_parallelism(folder):
    assert_like_one_process(tensor_parallel(), ranks=2)


def mixed_precision(folder):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    split = sharded(init_device_mesh("cpu", (4,)), mp_policy=policy)
    assert_like_one_process(split, rtol=0, atol=2e-2)
    assert all(p.dtype == torch.float32 for p in split.parameters())


def offload(folder):
    assert_like_one_process(sharded(init_device_mesh("cpu", (4,)), offload_policy=CPUOffloadPolicy(pin_memory=False)))


def an_overflow_in_one_process_is_one_in_all(folder):
    split = sharded(init_device_mesh("cpu", (4,)))
    optimizer = SparseMaskedAdamW(split.named_parameters(), masks=MASKS)
    scaler, begun = torch.amp.GradScaler("cpu", init_scale=4.0), wholes(split)
    for steps in range(2):
        scaler.scale(split(batch(0, 4)).square().mean()).backward()
        if steps == 0 and dist.get_rank() == 1:
            split[0].weight.grad.to_local().fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        for name, value in wholes(split).items():
            assert torch.equal(value, begun[name]) == (steps == 0), name
        assert {int(state["step"]) for state in optimizer.state.values()} == {steps}
    assert scaler.get_scale() == 2.0


CHECKS = [fsdp2, hsdp, columns, tensor_parallelism, mixed_precision, offload, an_overflow_in_one_process_is_one_in_all]
