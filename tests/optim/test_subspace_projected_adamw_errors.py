"""Bases and memories that do not fit an optimizer are named, and leave it as it was."""

import pytest
import torch
from cases.subspace import orthogonal
from torch import nn

from sparse_cl import ColumnMask, RowMask, Subspace, SubspaceMemory, SubspaceProjectedAdamW

GOOD = orthogonal(8)[:, :3].float()


def model(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 6), nn.LayerNorm(6), nn.Linear(6, 4))


def remembered(of):
    memory = SubspaceMemory(of)
    for p in of.parameters():
        p.grad = torch.ones_like(p)
    memory.observe()
    memory.consolidate()
    return memory


WRONG = {
    "width": ({"2.weight": GOOD}, ValueError, r"'2.weight' has shape \(4, 6\), but its basis has width 8"),
    "no matrix": ({"0.bias": GOOD}, ValueError, r"'0.bias' has shape \(6,\), but its basis has width 8; .* \(n, r\)"),
    "not orthonormal": (
        {"0.weight": 2 * GOOD},
        ValueError,
        "parameter '0.weight': basis: its columns are not",
    ),
    "transposed": ({"0.weight": GOOD.mT}, ValueError, "at most 3 columns for a width of 3, got 8; is it transposed"),
    "dtype": ({"0.weight": GOOD.bfloat16()}, TypeError, "'0.weight': basis: expected a float32 or float64 tensor"),
    "device": (
        {"0.weight": Subspace(GOOD).to("meta")},
        ValueError,
        r"'0.weight' is on cpu, but its basis is on meta; move it with .to\('cpu'\)",
    ),
    "name": ({"1.wait": GOOD}, ValueError, "memory: no parameter is named '1.wait'; the first names are 0.weight"),
    "key": ({nn.Parameter(torch.ones(6, 8)): GOOD}, ValueError, "memory: a key is not a parameter of this optimizer"),
    "kind": ([GOOD], TypeError, "memory: expected a SubspaceMemory or {parameter or name: basis}, got list"),
    "other model": (remembered(model()), ValueError, "no parameter of this optimizer is tracked, not even '0.weight'"),
}


@pytest.mark.parametrize(("memory", "error", "message"), WRONG.values(), ids=WRONG)
def test_bases_that_do_not_fit(memory, error, message):
    mine = model()
    with pytest.raises(error, match=message):
        SubspaceProjectedAdamW(mine.named_parameters(), memory=memory)
    opt = SubspaceProjectedAdamW(mine.named_parameters(), weight_decay=0, memory={"0.weight": GOOD})
    with pytest.raises(error, match=message):
        opt.set_memory(memory)
    before = mine[0].weight.detach().clone()
    mine[0].weight.grad = torch.ones(6, 8)
    opt.step()
    change = mine[0].weight.detach() - before
    assert change.norm() > 0
    assert (change @ GOOD).norm() <= 1e-3 * change.norm()


def loaded(memory, folder):
    memory.save(folder / "memory.safetensors")
    return SubspaceMemory.load(folder / "memory.safetensors")


def test_a_loaded_memory_of_another_model(tmp_path):
    memory = loaded(remembered(model()), tmp_path)
    wider = model(10)
    with pytest.raises(ValueError, match=r"tracks '0.weight' of shape \(6, 8\), but this optimizer has it in sh"):
        SubspaceProjectedAdamW(wider.named_parameters(), memory=memory)
    shallow = nn.Sequential(nn.Linear(8, 6))
    with pytest.raises(ValueError, match="'2.weight' .*, but this optimizer has no parameter of that name"):
        SubspaceProjectedAdamW(shallow.named_parameters(), memory=memory)
    with pytest.raises(ValueError, match=r"the parameters have no names; call memory.bind\(model\), or pass"):
        SubspaceProjectedAdamW(model().parameters(), memory=memory)
    right = model()
    memory.bind(right)
    SubspaceProjectedAdamW([right[2].weight], memory=memory)


def test_arguments():
    with pytest.raises(ValueError, match="rest: expected 'freeze' or 'train', got 'frozen'"):
        SubspaceProjectedAdamW(model().parameters(), rest="frozen")
    with pytest.raises(ValueError, match="lr: expected a number of at least 0"):
        SubspaceProjectedAdamW(model().parameters(), lr=-1.0)
    with pytest.raises(ValueError, match="fused=True is not supported"):
        SubspaceProjectedAdamW(model().parameters(), fused=True)


MASKS = {
    "all": lambda shape: None,
    "rows": lambda shape: RowMask([1, 4], shape),
    "columns": lambda shape: ColumnMask([0, 2, 3, 6, 7], shape),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_breaks_off_leaves_the_weights(monkeypatch, kind, dtype):
    mine = model().to(dtype)
    weight = mine[0].weight
    mask = MASKS[kind](tuple(weight.shape))
    masks = None if mask is None else {"0.weight": mask}
    opt = SubspaceProjectedAdamW(mine.named_parameters(), memory={"0.weight": GOOD}, masks=masks)
    for number in range(3):
        weight.grad = torch.full_like(weight, number + 1.0)
        opt.step()
    before, projection = weight.detach().clone(), opt._projections[weight]

    def broken(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(projection.correction, "correct_", broken)
        opt.step()
    assert torch.equal(weight.detach(), before)
    opt.step()
    change = weight.detach().float() - before.float()
    assert 0 < change.abs().max() < 0.1
