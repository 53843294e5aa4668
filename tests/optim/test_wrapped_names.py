"""Parameters of wrapped models go by the names that they have in the model itself; lost ones are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_cl import ColumnMask, ElasticAdamW, RowMask, SparseMaskedAdamW, SubspaceMemory, SubspaceProjectedAdamW

SHAPE = (6, 4)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))


class DistributedDataParallel(nn.Module):
    """Known by its name, as the real one needs a process group."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Outer(DistributedDataParallel):
    """A model of the user's whose part is called so."""


NAMES = ["0.weight", "_orig_mod.0.weight", "module.0.weight", "module._orig_mod.0.weight", "_orig_mod.module.0.weight"]
NAMES += ["base_model.model.0.weight", "base_model.model.0.base_layer.weight", "module.base_model.model.0.weight"]


@pytest.mark.parametrize("given", NAMES)
@pytest.mark.parametrize("own", NAMES)
def test_names_that_differ_in_wrappers_are_one(given, own):
    weight = nn.Parameter(torch.zeros(SHAPE))
    optimizer = SparseMaskedAdamW([(own, weight)], masks={given: RowMask([1], SHAPE)})
    assert list(optimizer.masks) == [own]


def test_an_exact_name_comes_first_and_an_ambiguous_one_is_none():
    first, second, third = (nn.Parameter(torch.zeros(SHAPE)) for _ in range(3))
    named = [("w", first), ("module.w", second), ("module.v", third), ("_orig_mod.v", nn.Parameter(torch.zeros(SHAPE)))]
    masks = {"module.w": RowMask([1], SHAPE), "w": RowMask([2], SHAPE)}
    optimizer = SparseMaskedAdamW(named, masks=masks)
    assert optimizer.masks == masks
    with pytest.raises(ValueError, match="no parameter is named 'v'"):
        SparseMaskedAdamW(named, masks={"v": RowMask([1], SHAPE)})
    with pytest.raises(ValueError, match="is given twice"):
        SparseMaskedAdamW(named[:1], masks={"w": RowMask([1], SHAPE), "module.w": RowMask([1], SHAPE)})


def test_a_module_that_is_called_module_keeps_its_name():
    assert SubspaceMemory(Outer(network()), source="inputs").names == ["module.0.weight", "module.2.weight"]


WRAPS = [torch.compile, DistributedDataParallel, lambda model: DistributedDataParallel(torch.compile(model))]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("bound", [False, True])
def test_a_memory_of_the_model_serves_its_wrapped_self(tmp_path, wrap, bound):
    model = network()
    memory = SubspaceMemory(model, energy=0.9, source="inputs")
    with torch.no_grad(), memory.watch():
        model(torch.randn(9, 4))
    memory.observe()
    memory.consolidate()
    memory.save(tmp_path / "memory.safetensors")
    wrapped = wrap(model)
    loaded = SubspaceMemory.load(tmp_path / "memory.safetensors", wrapped if bound else None)
    optimizer = ElasticAdamW(wrapped.named_parameters(), memory=loaded)
    assert len(optimizer.projections) == 2
    assert SubspaceMemory(wrapped, source="inputs").names == memory.names


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_rows_of_a_tied_embedding_are_known_by_such_names_too(tmp_path, prefix):
    model = nn.ModuleDict({"table": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["table"].weight
    memory = SubspaceMemory(model, source="inputs")
    with torch.no_grad(), memory.watch():
        model["head"](model["table"](torch.tensor([1, 5])))
    memory.observe()
    memory.consolidate()
    memory.save(tmp_path / "memory.safetensors")
    memory = SubspaceMemory.load(tmp_path / "memory.safetensors")
    params = [(prefix + name, param) for name, param in model.named_parameters()]
    held = ElasticAdamW(params, lr=1e-2, memory=memory, budget=0)
    frozen = SubspaceProjectedAdamW(params, lr=1e-2, memory=memory)
    weight = model["table"].weight
    for optimizer, rows in ((held, [1, 5]), (frozen, range(9))):
        before = weight.detach().clone()
        weight.grad = torch.randn(9, 4)
        optimizer.step()
        assert torch.equal(weight[list(rows)], before[list(rows)])
        assert torch.equal(weight, before) is (optimizer is frozen)


def stepped(**options):
    weight = nn.Parameter(torch.randn(SHAPE))
    optimizer = SparseMaskedAdamW([("w", weight)], **options)
    weight.grad = torch.randn(SHAPE)
    optimizer.step()
    return weight, optimizer


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["mask", "memory"])
def test_parameters_that_were_swapped_are_refused(late, kind):
    weight, flat = nn.Parameter(torch.randn(SHAPE)), nn.Parameter(torch.randn(24))
    if kind == "mask":
        optimizer = SparseMaskedAdamW([("w", weight)], lr=1e-2, masks={"w": RowMask([1], SHAPE)})
    else:
        optimizer = ElasticAdamW([("w", weight)], lr=1e-2, memory={"w": torch.eye(4)[:, :2]})
    if late:
        weight.grad = torch.randn(SHAPE)
        optimizer.step()
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad, before = torch.randn(24), flat.detach().clone()
    with pytest.raises(RuntimeError, match=r"steps other tensors than it was given: .* of shape \(6, 4\)"):
        optimizer.step()
    assert torch.equal(flat, before)


@pytest.mark.parametrize(
    "loaded, own, words",
    [
        (RowMask([1, 3], SHAPE), RowMask([1, 4], SHAPE), r"\(rows 3 in the loaded one alone; 4 in this one alone\)"),
        (RowMask([0], SHAPE), RowMask([0, 1], SHAPE), r"\(rows 1 in this one alone\)"),
        (ColumnMask([0, 1], SHAPE), ColumnMask([0], SHAPE), r"\(columns 1 in the loaded one alone\)"),
        (RowMask(range(6), SHAPE), RowMask([], SHAPE), r"\(rows 0, 1, 2, 3, 4, … in the loaded one alone\)"),
        (RowMask([1], SHAPE), RowMask([1], SHAPE, gain=[0.5]), "of the same rows, with other gains"),
    ],
)
def test_a_state_of_other_rows_names_them(loaded, own, words):
    _, first = stepped(masks={"w": loaded})
    weight, second = stepped(masks={"w": own})
    second.load_state_dict(first.state_dict())
    weight.grad = torch.randn(SHAPE)
    with pytest.raises(ValueError, match=words):
        second.step()
