"""Memories and projected updates on a GPU find and keep what they do on the CPU."""

import pytest
import torch
from cases.subspace import gradients, largest_angle, orthogonal, with_gap
from torch import nn

from sparse_cl import ColumnMask, ElementMask, RowMask, SubspaceMemory, SubspaceProjectedAdamW

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROWS = 48
MASKS = {
    "dense": lambda shape: None,
    "rows": lambda shape: RowMask(range(0, shape[0], 3), shape),
    "columns": lambda shape: ColumnMask(range(0, shape[1], 2), shape),
    "elements": lambda shape: ElementMask(torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "max_rank"), [(96, None), (1100, 40)])
def test_the_same_bases_as_on_the_cpu(n, max_rank, dtype):
    directions = orthogonal(n)
    memories = []
    for device in ("cpu", DEVICE):
        param = nn.Parameter(torch.zeros(ROWS, n, dtype=dtype, device=device))
        memory = SubspaceMemory([("w", param)], max_rank=max_rank, energy=0.95)
        for domain in range(4):
            for gradient in gradients(with_gap(n, 16), ROWS, 3, domain, directions.roll(-13 * domain, 1)):
                param.grad = gradient.to(device, dtype)
                memory.observe()
            memory.consolidate()
        memories.append(memory)
    on_cpu, on_gpu = (memory.basis("w") for memory in memories)
    assert on_gpu.device.type == DEVICE
    assert abs(on_cpu.shape[1] - on_gpu.shape[1]) <= 1
    assert largest_angle(on_cpu, on_gpu.cpu()) <= 1e-2
    assert (on_gpu.mT @ on_gpu - torch.eye(on_gpu.shape[1], device=DEVICE)).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MASKS)
def test_leak_of_fifty_steps(name, dtype):
    n, rank = 64, 8
    mask = MASKS[name]((ROWS, n))
    basis = orthogonal(n)[:, :rank]
    param = nn.Parameter(torch.randn(ROWS, n).mul(0.1).to(DEVICE, dtype))
    start = param.detach().double().clone()
    masks = {} if mask is None else {"w": mask}
    memory = {"w": basis.float().to(DEVICE)}
    opt = SubspaceProjectedAdamW([("w", param)], lr=0.01, weight_decay=0.1, masks=masks, memory=memory)
    for _ in range(50):
        param.grad = torch.randn(ROWS, n).to(DEVICE, dtype)
        opt.step()
    stepped = param.detach().double().clone()
    if "master" in opt.state[param]:
        positions = torch.arange(param.numel()) if mask is None else mask.positions()
        stepped.view(-1)[positions.to(DEVICE)] = opt.state[param]["master"].double().view(-1)
    change = stepped - start
    inside = change @ basis.to(DEVICE)
    # Masks of single weights have no bound.
    assert inside.square().sum() <= (0.1 if name == "elements" else 1e-6) * change.square().sum()
    if mask is not None:
        frozen = ~mask.to_dense().to(DEVICE)
        assert torch.equal(param.detach()[frozen], start.to(dtype)[frozen])


def test_a_model_that_moves_takes_its_memory_along():
    model = nn.Linear(32, 16)
    memory = SubspaceMemory(model, energy=0.9)
    model.weight.grad = torch.randn(16, 32)
    memory.observe()
    memory.consolidate()
    model.to(DEVICE)
    optimizer = SubspaceProjectedAdamW(model.named_parameters(), memory=memory)
    before = {"weight": model.weight.detach().clone()}
    model(torch.randn(8, 32, device=DEVICE)).square().sum().backward()
    memory.observe()
    optimizer.step()
    assert memory.leak(before, model)["weight"] <= 1e-6
    assert memory.basis("weight").device.type == DEVICE
