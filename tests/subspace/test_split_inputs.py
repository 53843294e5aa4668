"""Weights of which no process has whole rows are refused by name, before anything would be wrong."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch import nn

from sparse_cl import SubspaceMemory


@pytest.fixture
def sharded():
    """A model as `fully_shard` leaves it on the first of two processes, the other of which is imagined."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    dist.init_process_group("fake", rank=0, world_size=2, store=fake.FakeStore())
    try:
        mesh = dist.init_device_mesh("cpu", (2,))
        yield fsdp.fully_shard(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), mesh=mesh)
    finally:
        dist.destroy_process_group()


def test_a_memory_refuses_weights_that_are_split_along_their_inputs(sharded):
    SubspaceMemory(sharded, source="inputs")
    parallel = pytest.importorskip("torch.distributed.tensor.parallel")
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    plan = {"0": parallel.ColwiseParallel(), "1": parallel.RowwiseParallel()}
    parallel.parallelize_module(model, dist.init_device_mesh("cpu", (2,)), plan)
    for given in (model, model.named_parameters()):
        with pytest.raises(ValueError, match="params: 1.weight is split over processes along its inputs"):
            SubspaceMemory(given)
