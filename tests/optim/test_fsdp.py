"""SparseMaskedAdamW of parameters that FSDP2, HSDP or tensor parallelism has split, against one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases.optimizers import as_bytes, random_mask
from cases.sharded import assert_passed, make_all, outcomes, start
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from sparse_cl import ColumnMask, RowMask, SparseMaskedAdamW

PROCESSES = 4
CHECKS = {}
#: Rows that 4 processes share evenly, unevenly, and that are fewer than there are processes.
SHAPES = {"even": (8, 8), "uneven": (9, 8), "few": (2, 8), "bias": (7,), "conv": (5, 4, 3), "scale": (), "none": (0, 8)}
KINDS = ("dense", "rows", "columns", "elements", "two_four")


def check(function):
    CHECKS[function.__name__] = function
    return function


def work(rank, folder):
    make_all(rank, PROCESSES, folder, CHECKS)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    start(work, PROCESSES, folder)
    return outcomes(folder, PROCESSES)


def values(dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=rng).to(dtype) for name, shape in SHAPES.items()}


def masks_of(kind, seed=1):
    rng = torch.Generator().manual_seed(seed)
    given = {}
    for name, shape in SHAPES.items():
        if kind == "rows" and shape:
            units = (torch.rand(shape[0], generator=rng) < 0.5).nonzero().view(-1)
            given[name] = RowMask(units, shape, gain=0.5 + torch.rand(len(units), generator=rng))
        elif kind == "elements" or (kind != "rows" and len(shape) == 2):
            given[name] = random_mask(kind, shape, 0.4, rng)
    return {name: mask for name, mask in given.items() if mask is not None}


def distributed(tensor, mesh, placements):
    if tensor.dim() == 0:
        placements = [Replicate()] * mesh.ndim
    return distribute_tensor(tensor, mesh, placements)


class Twins:
    """One process's optimizer, and that of parameters that are split."""

    def __init__(self, mesh, placements, masks, dtype=torch.float32, **options):
        self.mesh, self.placements = mesh, placements
        self.one = {name: nn.Parameter(value.clone()) for name, value in values(dtype).items()}
        split = {name: distributed(value, mesh, self.of(value)) for name, value in values(dtype).items()}
        self.many = {name: nn.Parameter(value) for name, value in split.items()}
        self.optimizers = [SparseMaskedAdamW(p.items(), masks=masks, **options) for p in (self.one, self.many)]
        self.rng = torch.Generator().manual_seed(2)

    def of(self, value):
        return [p if not isinstance(p, Shard) or p.dim < value.dim() else Replicate() for p in self.placements]

    def backward(self):
        for name, param in self.one.items():
            param.grad = torch.randn(param.shape, generator=self.rng).to(param.dtype)
            self.many[name].grad = distributed(param.grad.clone(), self.mesh, self.of(param))

    def step(self, times=1):
        for _ in range(times):
            self.backward()
            for optimizer in self.optimizers:
                optimizer.step()

    def assert_equal(self):
        for name, param in self.one.items():
            whole = self.many[name].full_tensor()
            assert torch.equal(as_bytes(whole), as_bytes(param)), name


def meshes():
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return {
        "rows": (flat, [Shard(0)]),
        "columns": (flat, [Shard(1)]),
        "hsdp": (square, [Replicate(), Shard(0)]),
        "rows and columns": (square, [Shard(0), Shard(1)]),
    }


def allowed(kind, placements):
    return kind != "two_four" or Shard(1) not in placements


@check
def every_mask_steps_as_in_one_process(folder):
    for mesh, placements in meshes().values():
        for kind in KINDS:
            for options in ({}, {"amsgrad": True, "dtype": torch.bfloat16}, {"second_moment": "row"}):
                if not allowed(kind, placements) or ("second_moment" in options and Shard(1) in placements):
                    continue
                twins = Twins(mesh, placements, masks_of(kind), **options)
                twins.step(2)
                twins.assert_equal()
                twins.optimizers[1].set_masks(masks_of(kind, 3))
                twins.optimizers[0].set_masks(masks_of(kind, 3))
                twins.step(2)
                twins.assert_equal()


@pytest.mark.parametrize("name", CHECKS)
def test_four_processes(found, name):
    assert_passed(found, name)
