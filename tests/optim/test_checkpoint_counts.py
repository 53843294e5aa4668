"""Checkpoints whose keys and shapes do not depend on history, so that torch.distributed.checkpoint takes them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from sparse_cl import ColumnMask, ElementMask, RowMask, SparseMaskedAdamW

SHAPE = (6, 8)
EYE = torch.eye(*SHAPE).bool()
PAIRS = {
    "rows": (RowMask([1], SHAPE), RowMask([1, 4], SHAPE)),
    "columns": (ColumnMask([1], SHAPE), ColumnMask([1, 4], SHAPE)),
    "elements": (ElementMask(EYE), ElementMask(EYE | EYE.roll(1, 1))),
    "rows to all": (RowMask([1], SHAPE), None),
    "columns to rows": (ColumnMask([1, 2], SHAPE), RowMask([1, 4], SHAPE)),
}


def masks(mask):
    return {} if mask is None else {"weight": mask}


def step(layer, optimizer):
    layer.weight.grad = torch.arange(48.0).view(SHAPE) / 48
    optimizer.step()
    optimizer.zero_grad()


def make(mask, **options):
    torch.manual_seed(0)
    layer = nn.Linear(8, 6, bias=False)
    return layer, SparseMaskedAdamW(layer.named_parameters(), masks=masks(mask), **options)


def with_history(first, second, **options):
    layer, optimizer = make(first, **options)
    step(layer, optimizer)
    optimizer.set_masks(masks(second))
    step(layer, optimizer)
    assert "cohort" in optimizer.state[layer.weight]
    return layer, optimizer


def goes_on_alike(layer, optimizer, other, fresh):
    other.load_state_dict(layer.state_dict())
    for _ in range(2):
        step(layer, optimizer)
        step(other, fresh)
    return torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_keys_and_shapes_are_those_of_a_fresh_optimizer(pair):
    entries = with_history(*pair)[1].state_dict()["state"][0]
    layer, fresh = make(pair[1])
    step(layer, fresh)
    others = fresh.state_dict()["state"][0]
    assert others["counts"] == b"same" != entries["counts"]
    assert entries["step"] == 2
    assert [(k, v.shape, v.dtype) for k, v in entries.items() if k != "counts"] == [
        (k, v.shape, v.dtype) for k, v in others.items() if k != "counts"
    ]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("full", [False, True])
def test_distributed_checkpoint_takes_state_after_set_masks(tmp_path, pair, full):
    layer, optimizer = with_history(*pair)
    other, fresh = make(pair[1])
    options = StateDictOptions(full_state_dict=full, cpu_offload=full)
    dcp.save({"o": get_optimizer_state_dict(layer, optimizer, options=options)}, checkpoint_id=tmp_path, no_dist=True)
    state = {"o": get_optimizer_state_dict(other, fresh, options=options)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(other, fresh, state["o"], options=options)
    assert goes_on_alike(layer, optimizer, other, fresh)


@pytest.mark.parametrize("second_moment", ["entry", "row"])
def test_a_state_with_cohorts_of_an_earlier_version_is_read(second_moment):
    layer, optimizer = with_history(*PAIRS["rows"], second_moment=second_moment)
    old = copy.deepcopy(optimizer.state_dict())
    old["state"][0] = copy.deepcopy(dict(optimizer.state[layer.weight]))
    assert "counts" not in old["state"][0] and "cohort" in old["state"][0]
    other, fresh = make(PAIRS["rows"][1], second_moment=second_moment)
    fresh.load_state_dict(old)
    assert goes_on_alike(layer, optimizer, other, fresh)
