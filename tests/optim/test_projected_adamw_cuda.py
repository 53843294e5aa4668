"""ProjectedAdamW on a GPU: pulls and projections beside the same steps in float64 on the CPU."""

import math

import pytest
import torch
from cases.adamw import bits
from cases.cuda_device import DEVICE, captured, needs_device, no_waiting, random
from cases.subspace import orthogonal
from torch import nn

from sparse_cl import ElementMask, RowMask, SubspaceProjectedAdamW
from sparse_cl.optim.curvature_projection import CurvatureProjection
from sparse_cl.optim.low_rank import DriftBudget, LowRankPull
from sparse_cl.optim.projected_adamw import ProjectedAdamW
from sparse_cl.subspace import Subspace
from sparse_cl.subspace.kronecker import Kronecker, threshold_of

pytestmark = [needs_device, pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")]

M, N = 40, 56
OPTIONS = dict(lr=0.01, weight_decay=0.1)
START = random(M, N) / 8


def strengths(size, seed):
    return 200 * torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


RANK = 9


def directions(anchor):
    dtype = torch.float64 if anchor.dtype == torch.float64 else torch.float32
    return Subspace(*(x.to(anchor.device, dtype) for x in (orthogonal(N)[:, :RANK], strengths(RANK, 1))))


def pull(anchor):
    return LowRankPull(directions(anchor), directions(anchor).values)


def budget(anchor):
    return DriftBudget(directions(anchor), 1e-3)


def curvature(mode):
    def make(anchor):
        dtype = torch.float64 if anchor.dtype == torch.float64 else torch.float32
        factors = (orthogonal(size, size) * torch.logspace(0, -3, size, dtype=torch.float64) for size in (M, N))
        found = Kronecker.of(*((x @ x.mT).to(anchor.device) for x in factors), dtype)
        # Off the products themselves, which rounding would put on either side.
        return CurvatureProjection(found, 1.001 * threshold_of([found], 0.9), mode)

    return make


PROJECTIONS = {
    "pull": pull,
    "budget": budget,
    "hard-curvature": curvature("hard"),
    "soft-curvature": curvature("soft"),
}


def run(make, dtype, device, steps=20, **options):
    """A parameter and its optimizer after some steps; its weights in the precision in which they are stepped."""
    param = nn.Parameter(START.to(dtype).to(device, copy=True))
    optimizer = ProjectedAdamW([param], projections={param: make(param.detach().clone())}, **OPTIONS | options)
    for step in range(steps):
        param.grad = random(M, N, seed=1 + step).to(dtype).to(device)
        optimizer.step()
    return param, optimizer, optimizer.state[param].get("master", param.detach()).cpu()


def assert_near(got, exact, what):
    """Within some roundings of float32; a step too many or a direction amiss is off by 1e-3 and more."""
    error = float((got.detach().cpu().double() - exact.detach()).norm() / exact.detach().norm())
    assert error <= 3e-6, f"{what}: relative error {error:.3g}"


@pytest.mark.parametrize("name", PROJECTIONS)
def test_twenty_steps_are_those_of_the_oracle(name):
    param, mine, weights = run(PROJECTIONS[name], torch.float32, DEVICE)
    other, oracle, exact = run(PROJECTIONS[name], torch.float64, "cpu")
    assert_near(weights, exact, "weights")
    for moment in ("exp_avg", "exp_avg_sq"):
        assert_near(mine.state[param][moment], oracle.state[other][moment], moment)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_parameter_in_bfloat16_is_its_master_rounded(name):
    make = PROJECTIONS[name]
    param, _, weights = run(make, torch.bfloat16, DEVICE)
    _, _, others = run(make, torch.bfloat16, "cpu")
    torch.testing.assert_close(weights, others, rtol=1e-4, atol=1e-5)
    assert torch.equal(param.detach().cpu(), weights.to(torch.bfloat16))


@pytest.mark.parametrize("lr_on", ["cpu", "device"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_learning_rates_that_are_tensors(lr_on, shape):
    lr = torch.full(shape, OPTIONS["lr"], device="cpu" if lr_on == "cpu" else DEVICE)
    _, _, expected = run(pull, torch.float32, DEVICE, steps=3)
    _, _, weights = run(pull, torch.float32, DEVICE, steps=3, lr=lr)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_steps_do_not_wait_for_the_gpu_and_replay_from_a_graph(name):
    make = PROJECTIONS[name]
    lr = torch.tensor(OPTIONS["lr"], device=DEVICE)
    pairs = [run(make, torch.bfloat16, DEVICE, steps=2, lr=lr, capturable=True)[:2] for _ in range(2)]
    (eager, its_optimizer), (graphed, optimizer) = pairs
    with no_waiting():
        its_optimizer.step()
    optimizer.step()
    replay = captured(optimizer.step)
    for step in range(3):
        for param in (eager, graphed):
            param.grad.copy_(random(M, N, seed=50 + step))
        lr.mul_(0.5)
        with no_waiting():
            its_optimizer.step()
        replay()
    masters = [o.state[p]["master"].cpu() for p, o in pairs]
    torch.testing.assert_close(*masters, rtol=1e-5, atol=1e-6)
    assert int(optimizer.state[graphed]["step"]) == 6


def test_subspace_steps_replay_from_a_graph():
    """Of rows and of whole weights, in one optimizer."""
    memory = orthogonal(N)[:, :12].float().to(DEVICE)
    mask = RowMask(range(0, M, 3), (M, N))
    runs = []
    for graph in (False, True):
        params = [nn.Parameter(START.to(torch.bfloat16).to(DEVICE)) for _ in range(2)]
        optimizer = SubspaceProjectedAdamW(
            params, masks={params[0]: mask}, memory=dict.fromkeys(params, memory), capturable=True, **OPTIONS
        )
        step = optimizer.step
        for number in range(4):
            for i, param in enumerate(params):
                grad = random(M, N, seed=10 * number + i).to(DEVICE, torch.bfloat16)
                param.grad = grad if param.grad is None else param.grad.copy_(grad)
            if graph and number == 1:
                step = captured(optimizer.step)
            if number:
                step()
            else:
                optimizer.step()
        runs.append([optimizer.state[param]["master"].cpu() for param in params])
    for eager, graphed in zip(*runs, strict=True):
        torch.testing.assert_close(graphed, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_step_that_overflowed_changes_nothing(name, dtype):
    param, optimizer, _ = run(PROJECTIONS[name], dtype, DEVICE, steps=2)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=8.0)
    scaler.scale(torch.ones((), device=DEVICE))  # makes the scale

    def all_bits():
        return [bits(t.detach()).cpu().clone() for t in (param, *optimizer.state[param].values())]

    before = all_bits()
    param.grad = torch.full((M, N), math.inf, dtype=dtype, device=DEVICE)
    with no_waiting():
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, all_bits(), strict=True))


def test_single_weights_out_of_a_subspace_keep_frozen_bits():
    """The projection that may wait; its leak is that of the CPU's."""
    basis = orthogonal(N)[:, :6].float()
    mask = ElementMask(torch.rand(M, N, generator=torch.Generator().manual_seed(0)) < 0.7)
    moved = []
    for device in (DEVICE, "cpu"):
        param = nn.Parameter(START.to(device, copy=True))
        optimizer = SubspaceProjectedAdamW([param], masks={param: mask}, memory={param: basis.to(device)}, **OPTIONS)
        for step in range(3):
            param.grad = random(M, N, seed=step).to(device)
            optimizer.step()
        moved.append(param.detach().cpu() - START)
        assert not moved[-1][~mask.to_dense()].any()
    torch.testing.assert_close(*moved, rtol=1e-3, atol=1e-4)
