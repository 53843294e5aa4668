"""Checks of engines of torch that flatten or deal out parameters: nothing is made of these, and nothing stepped."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer

from sparse_cl import ElasticAdamW, RowMask, SparseMaskedAdamW, SubspaceMemory, SubspaceProjectedAdamW, protect

SHAPE = (16, 8)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 8, bias=False))


def memory_of(model):
    memory = SubspaceMemory(model, energy=0.9, source="inputs")
    with torch.no_grad(), memory.watch():
        model(torch.ones(2, 8))
    memory.observe()
    memory.consolidate()
    return memory


def fsdp1(model, original):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))


def protected(params, memory):
    optimizer = torch.optim.AdamW(params)
    protect(optimizer, memory, budget=0.0)
    return optimizer


MAKERS = {
    "masks": lambda params, _: SparseMaskedAdamW(params, masks={"0.weight": RowMask([1, 5], SHAPE)}),
    "basis": lambda params, _: ElasticAdamW(params, memory={"0.weight": torch.eye(8)[:, :3]}),
    "memory": lambda params, memory: SubspaceProjectedAdamW(params, memory=memory),
    "protect": protected,
}


def fsdp1_is_refused(folder):
    for make in MAKERS.values():
        for original in (True, False):
            model = network()
            memory = memory_of(model)
            wrapped = fsdp1(model, original)
            with pytest.raises(RuntimeError, match="FSDP1 has flattened the parameters, .*by FSDP2 .*fully_shard"):
                make(wrapped.named_parameters(), memory)


def fsdp1_behind_the_optimizers_back_is_refused(folder):
    for make in MAKERS.values():
        model = network()
        optimizer = make(model.named_parameters(), memory_of(model))
        wrapped = fsdp1(model, True)
        before = [p.detach().clone() for p in model.parameters()]
        wrapped(torch.ones(2, 8)).square().mean().backward()
        with pytest.raises(RuntimeError, match="FSDP1 has flattened the parameters, .*by FSDP2 .*fully_shard"):
            optimizer.step()
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def the_optimizer_that_deals_out_parameters_is_refused(folder):
    model = network()
    masks = {weight: RowMask([1, 5], weight.shape) for weight in model.parameters()}
    bases = {weight: torch.eye(weight.shape[1])[:, :3] for weight in model.parameters()}
    for kind, given in ((SparseMaskedAdamW, {"masks": masks}), (ElasticAdamW, {"memory": bases})):
        with pytest.raises(ValueError, match="not a parameter .*ZeroRedundancyOptimizer .*by FSDP2 .*fully_shard"):
            ZeroRedundancyOptimizer(model.parameters(), kind, lr=1e-2, **given)


CHECKS = [
    fsdp1_is_refused,
    fsdp1_behind_the_optimizers_back_is_refused,
    the_optimizer_that_deals_out_parameters_is_refused,
]
