"""Bounds hold where the caller lets float32 products be made of bfloat16 ones."""

import pytest
import torch
from cases.subspace import gradients, largest_angle, observe_all, orthogonal, weight, with_gap

from sparse_cl import SubspaceMemory, SubspaceProjectedAdamW


@pytest.fixture
def coarse_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    x = torch.randn(256, 256)
    exact = x.double() @ x.double()
    if ((x @ x) - exact).abs().max() < 1e-3 * exact.abs().max():
        torch.set_float32_matmul_precision(before)
        pytest.skip("this CPU makes no float32 product of bfloat16 ones")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("n", "max_rank"), [(96, None), (1100, 40)])
def test_bases_and_updates(coarse_products, n, max_rank):
    param = weight(64, n)
    memory = SubspaceMemory([("w", param)], max_rank=max_rank, energy=0.95)
    optimizer = SubspaceProjectedAdamW([param], lr=1e-2, weight_decay=0.1, memory=memory)
    directions, past = orthogonal(n), []
    for domain in range(4):
        before = {"w": param.detach().clone()}
        seen = gradients(with_gap(n, 16), 64, 6, seed=domain, directions=directions.roll(-13 * domain, 1))
        for gradient in seen:
            param.grad = gradient.float()
            memory.observe()
            optimizer.step()
        assert memory.leak(before, {"w": param})["w"] <= 1e-6
        past.append(torch.cat(seen))
        rank = memory.rank("w")
        memory.consolidate()
        basis = memory.basis("w")
        assert max_rank is not None or basis.shape[1] > rank
        kept = sum(float((rows @ basis.double()).square().sum() / rows.square().sum()) for rows in past)
        assert kept >= (0.94 if max_rank is None else 0.5) * len(past)
        assert (basis.mT.double() @ basis.double() - torch.eye(basis.shape[1])).abs().max() <= 1e-5


def test_the_same_directions_as_in_full_precision(coarse_products):
    """Only observing is coarser, and by no more than what bfloat16 products add to a sum of squares."""
    param = weight(64, 96)
    seen = gradients(with_gap(96, 24), 64, steps=4)
    coarse = SubspaceMemory([("w", param)], energy=0.95)
    observe_all(coarse, param, seen)
    torch.set_float32_matmul_precision("highest")
    fine = SubspaceMemory([("w", param)], energy=0.95)
    observe_all(fine, param, seen)
    fine.consolidate()
    torch.set_float32_matmul_precision("medium")
    coarse.consolidate()
    assert abs(coarse.rank("w") - fine.rank("w")) <= 1
    assert largest_angle(coarse.basis("w"), fine.basis("w")) <= 1e-2
