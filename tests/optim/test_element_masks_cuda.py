"""Masks of single weights in bfloat16 on a GPU: densities, clusters, counts around the sizes of blocks and segments."""

import pytest
import torch
from cases.adamw import bits
from cases.cuda_device import DEVICE, check_error, needs_device, random
from torch import nn
from torch.optim import AdamW

from sparse_cl import ElementMask, SparseMaskedAdamW

pytestmark = needs_device

OPTIONS = dict(lr=0.02, weight_decay=0.1)


def scattered(density, shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def run_of(size, start, count):
    dense = torch.zeros(size, dtype=torch.bool)
    dense[start : start + count] = True
    return dense


def corner():
    dense = torch.zeros(1031, 2053, dtype=torch.bool)
    dense[:70, -90:] = True
    return dense


def two_clusters():
    """Thousands of active weights, then none in millions, then thousands to the last one."""
    return run_of(4_000_003, 0, 5000) | run_of(4_000_003, 4_000_003 - 3001, 3001)


#: What the kernel cuts by: 1024 weights a rank, 2048 a warp, 16384 a round of a block.
EDGES = (1023, 1024, 1025, 2047, 2048, 2049, 16383, 16384, 16385)

SETS = {
    "densities": lambda: [
        *(scattered(density, (1031, 2053), 0) for density in (1e-4, 0.01)),
        *(scattered(density, (301, 1027), 1) for density in (0.3, 0.9)),
    ],
    "clusters": lambda: [corner(), two_clusters(), run_of(50_001, 50_000, 1), run_of(50_001, 0, 1)],
    "counts": lambda: [run_of(40_009, 777, count) for count in EDGES],
    "sizes": lambda: [scattered(0.5, (size,), size) for size in EDGES] + [torch.ones(2049, dtype=torch.bool)],
}


@pytest.mark.parametrize("master", [True, False])
@pytest.mark.parametrize("name", SETS)
def test_three_steps_are_those_of_the_active_weights_alone(name, master):
    """Against AdamW in float64 on a vector of the active weights."""
    opened = SETS[name]()
    params = [
        nn.Parameter(random(*dense.shape, seed=i).to(torch.bfloat16).to(DEVICE)) for i, dense in enumerate(opened)
    ]
    starts = [p.detach().cpu() for p in params]
    chosen = {p: ElementMask(dense) for p, dense in zip(params, opened, strict=True)}
    optimizer = SparseMaskedAdamW(params, masks=chosen, master_weights=master, **OPTIONS)
    exact, plain = (
        [nn.Parameter(start[dense].to(dtype)) for start, dense in zip(starts, opened, strict=True)]
        for dtype in (torch.float64, torch.float32)
    )
    others = [(exact, AdamW(exact, **OPTIONS)), (plain, AdamW(plain, **OPTIONS))]
    for step in range(3):
        for i, (param, dense) in enumerate(zip(params, opened, strict=True)):
            grad = random(*dense.shape, seed=100 + 10 * step + i).to(torch.bfloat16)
            param.grad = grad.to(DEVICE)
            for those, _ in others:
                those[i].grad = grad[dense].to(those[i].dtype)
        if not master:
            # Rounding is random: each step is held against one from the same weights.
            for those, _ in others:
                for i, dense in enumerate(opened):
                    those[i].data.copy_(params[i].detach().cpu()[dense])
        optimizer.step()
        for _, other in others:
            other.step()
        for i, (param, dense) in enumerate(zip(params, opened, strict=True)):
            after = param.detach().cpu()
            assert torch.equal(bits(after[~dense]), bits(starts[i][~dense])), f"frozen weights of {i} changed"
            state, active = optimizer.state[param], after[dense]
            if master:
                check_error(state["master"].cpu(), plain[i].detach(), exact[i].detach(), f"master of {i}")
                assert torch.equal(active, state["master"].cpu().to(torch.bfloat16)), f"rounded weights of {i}"
            else:
                # One of the two neighbours; a float32 update near a representable number may cross it by a little.
                off = (active.double() - exact[i].detach()).abs()
                spacing = exact[i].detach().abs().log2().floor().clamp(min=-126).exp2() * 2**-7
                assert bool((off <= 1.001 * spacing + 1e-6).all()), f"rounded weights of {i}"
            for moment in ("exp_avg", "exp_avg_sq"):
                theirs = (other.state[those[i]][moment] for those, other in reversed(others))
                check_error(state[moment].cpu(), *theirs, f"{moment} of {i}")


def test_random_rounding_has_no_bias():
    """A million active weights, whose exact step lies a quarter of the way to the next bfloat16."""
    shape = (1031, 2053)
    dense = scattered(0.5, shape, 3)
    param = nn.Parameter(torch.full(shape, 1.5, dtype=torch.bfloat16, device=DEVICE))
    optimizer = SparseMaskedAdamW(
        [param],
        masks={param: ElementMask(dense)},
        master_weights=False,
        lr=2.0**-9,
        betas=(0.0, 0.0),
        weight_decay=0.0,
    )
    param.grad = torch.full(shape, -1.0, dtype=torch.bfloat16, device=DEVICE)
    optimizer.step()
    moved = (param.detach().cpu().double() - 1.5)[dense] * 2**7
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    # Ten standard deviations of a fair draw.
    assert abs(float(moved.mean()) - 0.25) < 10 * (0.25 * 0.75 / moved.numel()) ** 0.5
