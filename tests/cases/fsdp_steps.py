"""Checks of SparseMaskedAdamW: parameters that several processes hold together step as in one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases.optimizers import as_bytes, random_mask
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from sparse_cl import RowMask, SparseMaskedAdamW

#: Rows that 4 processes share unevenly, and that are fewer than there are processes.
SHAPES = {"uneven": (9, 8), "few": (2, 8), "bias": (7,), "conv": (5, 4, 3), "scale": (), "none": (0, 8)}
KINDS = ("dense", "rows", "columns", "elements", "two_four")


def names(kinds):
    fits = {
        "rows": lambda shape: shape,
        "columns": lambda shape: len(shape) == 2,
        "two_four": lambda shape: len(shape) == 2,
    }
    return {
        f"{kind}_{name}": (kind, shape)
        for kind in kinds
        for name, shape in SHAPES.items()
        if fits.get(kind, lambda _: True)(shape)
    }


def values(kinds, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=rng).to(dtype) for name, (_, shape) in names(kinds).items()}


def masks_of(kinds, seed=1):
    rng = torch.Generator().manual_seed(seed)
    given = {}
    for name, (kind, shape) in names(kinds).items():
        if kind == "rows":
            units = (torch.rand(shape[0], generator=rng) < 0.5).nonzero().view(-1)
            given[name] = RowMask(units, shape, gain=0.5 + torch.rand(len(units), generator=rng))
        elif kind != "dense":
            given[name] = random_mask(kind, shape, 0.4, rng)
    return given


def build(mesh, placements, kinds, masks, dtype=torch.float32, **options):
    """A model whose parameters are split, or whole without a mesh, and its optimizer."""
    begun = values(kinds, dtype)
    params = nn.ParameterDict({name: nn.Parameter(split(value, mesh, placements)) for name, value in begun.items()})
    return params, SparseMaskedAdamW(params.named_parameters(), masks=masks, **options)


def split(tensor, mesh, placements):
    if mesh is None:
        return tensor.clone()
    own = [p if p.is_replicate() or p.dim < tensor.dim() else Replicate() for p in placements]
    return distribute_tensor(tensor.clone(), mesh, own, src_data_rank=None)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Twins:
    """The same training in one process and in several."""

    def __init__(self, mesh, placements, kinds=KINDS, **options):
        self.places, self.kinds = ((None, None), (mesh, placements)), kinds
        made = (build(*at, kinds, masks_of(kinds), **options) for at in self.places)
        self.models, self.optimizers = map(list, zip(*made, strict=True))
        self.rng = torch.Generator().manual_seed(2)

    def backward(self):
        for name, param in self.models[0].items():
            grad = torch.randn(param.shape, generator=self.rng).to(param.dtype)
            for model, at in zip(self.models, self.places, strict=True):
                model[name].grad = split(grad, *at)

    def step(self, times=1):
        for _ in range(times):
            self.backward()
            for optimizer in self.optimizers:
                optimizer.step()

    def set_masks(self, seed):
        for optimizer in self.optimizers:
            optimizer.set_masks(masks_of(self.kinds, seed))

    def assert_equal(self):
        one, many = self.models
        for name, param in one.items():
            own = split(param.detach(), *self.places[1])
            assert torch.equal(as_bytes(local(many[name])), as_bytes(local(own))), name


def meshes():
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return {
        "rows": (flat, [Shard(0)]),
        "columns": (flat, [Shard(1)]),
        "hsdp": (square, [Replicate(), Shard(0)]),
        "rows and columns": (square, [Shard(0), Shard(1)]),
    }


def kinds_for(placements):
    """A group of four columns may not be split."""
    return [kind for kind in KINDS if kind != "two_four" or Shard(1) not in placements]


def every_mask_steps_as_in_one_process(folder):
    for mesh, placements in meshes().values():
        # Where columns are split, no process has whole rows.
        by_row = [] if Shard(1) in placements else [{"second_moment": "row"}]
        for options in ({"amsgrad": True, "dtype": torch.bfloat16}, *by_row):
            twins = Twins(mesh, placements, kinds_for(placements), **options)
            twins.step(2)
            twins.assert_equal()
            twins.set_masks(seed=3)
            twins.step(2)
            twins.assert_equal()


def the_norm_is_that_of_one_process_everywhere(folder):
    for mesh, placements in meshes().values():
        twins = Twins(mesh, placements, ["elements"])
        twins.backward()
        one, many = (optimizer.clip_grad_norm_(0.1) for optimizer in twins.optimizers)
        torch.testing.assert_close(many, one, rtol=1e-6, atol=0)
        assert len(set(from_all(float(many)))) == 1
        for name, param in twins.models[0].items():
            own = split(param.grad, mesh, placements)
            torch.testing.assert_close(local(twins.models[1][name].grad), local(own), rtol=1e-6, atol=0)


def from_all(value):
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def pieces_are_rounded_by_other_random_bits_and_replicas_by_the_same(folder):
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    for mesh, placements in ((flat, [Shard(0)]), (square, [Replicate(), Shard(0)])):
        weight = nn.Parameter(distribute_tensor(torch.ones(8, 64, dtype=torch.bfloat16), mesh, placements))
        optimizer = SparseMaskedAdamW([weight], lr=1e-3, master_weights=False)
        weight.grad = distribute_tensor(torch.ones(8, 64, dtype=torch.bfloat16), mesh, placements)
        optimizer.step()
        pieces = weight.full_tensor().chunk(mesh.size(mesh.ndim - 1))
        assert not any(torch.equal(pieces[0], other) for other in pieces[1:])
        every = from_all(weight.to_local())
        assert mesh is flat or (torch.equal(every[0], every[2]) and torch.equal(every[1], every[3]))


def processes_that_differ_are_told_how(folder):
    mesh, odd, kinds = init_device_mesh("cpu", (2, 2)), dist.get_rank() == 3, ["rows"]
    right = masks_of(kinds)
    cases = {
        "the mask of parameter 'rows_few' is RowMask.* in process 0 and RowMask.*8 of 16.* in process 3": (
            {**right, "rows_few": RowMask([1], SHAPES["few"])},
            1e-3,
        ),
        "lr of group 0 is 0.001 in process 0 and 0.01 in process 3": (right, 1e-2),
        "the mask of parameter 'rows_bias' is RowMask.* in process 0 and none in process 3": (
            {name: mask for name, mask in right.items() if name != "rows_bias"},
            1e-3,
        ),
    }
    for message, (masks, lr) in cases.items():
        masks, lr = (masks, lr) if odd else (right, 1e-3)
        model, optimizer = build(mesh, [Replicate(), Shard(0)], kinds, masks, lr=lr)
        for param in model.values():
            param.grad = torch.zeros_like(param)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert not optimizer.state


CHECKS = [
    every_mask_steps_as_in_one_process,
    the_norm_is_that_of_one_process_everywhere,
    pieces_are_rounded_by_other_random_bits_and_replicas_by_the_same,
    processes_that_differ_are_told_how,
]
