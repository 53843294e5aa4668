"""Parameters of which each process holds a part: what cannot take them refuses by name, before anything is wrong."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from sparse_cl import (
    ElasticAdamW,
    ProjectedAdamW,
    RowMask,
    SparseMaskedAdamW,
    SubspaceMemory,
    TwoFourMask,
    protect,
)
from sparse_cl.nn import activate
from sparse_cl.optim.active_gradients import active_gradients


@pytest.fixture
def mesh():
    """Of the first of two processes, the other of which is imagined."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", rank=0, world_size=2, store=fake.FakeStore())
    try:
        yield dist.init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


@pytest.fixture
def sharded(mesh):
    """A model as `fully_shard` leaves it."""
    return fully_shard(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), mesh=mesh)


MESSAGE = "is a DTensor, of which each process holds a part .*; expected a whole weight: train in one process"


@pytest.mark.parametrize("kind", [ProjectedAdamW, ElasticAdamW])
def test_an_optimizer_refuses_them(sharded, kind):
    with pytest.raises(ValueError, match=f"params: parameter '0.weight' {MESSAGE}"):
        kind(sharded.named_parameters(), lr=1e-3)


def test_a_memory_refuses_them(sharded):
    for given in (sharded, sharded.named_parameters()):
        with pytest.raises(ValueError, match=f"model_or_named_params: 0.weight {MESSAGE}"):
            SubspaceMemory(given)


def test_a_protection_refuses_them(sharded):
    memory = SubspaceMemory(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)))
    with pytest.raises(ValueError, match=f"optimizer: parameter '?0.weight'? {MESSAGE}"):
        protect(torch.optim.AdamW(sharded.named_parameters()), memory)


@pytest.mark.parametrize("placement", [Partial(), Shard(2)])
def test_other_placements_are_refused_by_name(mesh, placement):
    param = nn.Parameter(DTensor.from_local(torch.zeros(2, 4, 6), mesh, [placement], run_check=False))
    with pytest.raises(
        ValueError, match=r"parameter 'w' is placed as \(.*expected Replicate, Shard\(0\) or Shard\(1\)"
    ):
        SparseMaskedAdamW([("w", param)])


def test_a_mask_of_the_part_is_refused(sharded):
    message = (
        r"'0.weight' has shape \(6, 8\), but its mask is for \(3, 8\), which this process holds of it; masks are of"
    )
    with pytest.raises(ValueError, match=message):
        SparseMaskedAdamW(sharded.named_parameters(), masks={"0.weight": RowMask([1], (3, 8))})


def test_groups_of_four_that_are_split_are_refused(mesh):
    mask = TwoFourMask(torch.tensor([True, False] * 6).view(1, 12))
    param = nn.Parameter(distribute_tensor(torch.zeros(1, 12), mesh, [Shard(1)]))
    with pytest.raises(
        ValueError, match="parameter 'w': a TwoFourMask has groups of four columns, of which columns 0 to 5"
    ):
        SparseMaskedAdamW([("w", param)], masks={"w": mask})


def test_the_leaf_of_an_active_linear_is_refused(mesh):
    model = nn.Sequential(nn.Linear(8, 6))
    activate(model, {"0.weight": RowMask([1, 2], (6, 8))})
    fully_shard(model, mesh=mesh)
    leaves = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    with pytest.raises(ValueError, match=r"'0.active' is the leaf of an ActiveLinear .* sparse_cl.nn.restore"):
        SparseMaskedAdamW(leaves)


def test_gradients_that_call_no_hooks_are_refused(sharded):
    optimizer = SparseMaskedAdamW(sharded.named_parameters(), masks={"0.weight": RowMask([1], (6, 8))})
    with pytest.raises(ValueError, match="fully_shard has split; clip by optimizer.clip_grad_norm_"):
        active_gradients(optimizer)


def test_a_part_that_is_replaced_is_stepped_where_it_is(sharded):
    optimizer = SparseMaskedAdamW(sharded.named_parameters())
    weight = sharded[0].weight
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        old = weight._local_tensor
        # As a module does that is moved to another device.
        weight._local_tensor = old.clone()
    weight.grad = torch.ones_like(weight)
    before = old.clone()
    optimizer.step()
    assert torch.equal(old, before)
    assert not torch.equal(weight._local_tensor, before)
