"""Graphs, streams and loss scaling around SparseMaskedAdamW's step."""

import pytest
import torch
from cases.cuda_device import (
    DEVICE,
    Model,
    assert_same,
    captured,
    needs_device,
    needs_gpu,
    new_streams,
    no_waiting,
    on,
    random,
    wait,
)
from torch import nn

from sparse_cl import SparseMaskedAdamW

pytestmark = [needs_device, pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")]

SCALE = 1024.0


@pytest.mark.parametrize("master", [True, False])
def test_replays_equal_eager_steps(master):
    """With other gradients and another learning rate at each replay."""
    lr = torch.tensor(0.05, device=DEVICE)
    eager, graphed = (Model(torch.bfloat16, lr=lr, capturable=True, master_weights=master) for _ in range(2))
    for model in (eager, graphed):
        model.step(0)
    replay = captured(graphed.optimizer.step)
    assert_same(eager.snapshot(), graphed.snapshot())
    for step, rate in enumerate((0.05, 0.02, 0.1), start=1):
        lr.fill_(rate)
        eager.step(step)
        graphed.give(step)
        replay()
        assert_same(eager.snapshot(), graphed.snapshot())


def test_each_replay_rounds_by_new_random_bits():
    """From the same weights and moments, with an exact step of a quarter of bfloat16's spacing."""
    start = (1.25 + 0.5 * torch.rand(64, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    sign = random(64, 64).sign()
    exact = start.float() - 2.0**-9 * sign

    def make():
        param = nn.Parameter(start.to(DEVICE, copy=True))
        param.grad = sign.to(DEVICE, torch.bfloat16)
        # Without averages an update is lr times a sign, the same at every step.
        options = dict(betas=(0.0, 0.0), weight_decay=0.0, master_weights=False, capturable=True)
        optimizer = SparseMaskedAdamW([param], lr=torch.tensor(2.0**-9, device=DEVICE), **options)
        optimizer.step()
        return param, optimizer

    (param, graphed), (other, eager) = make(), make()
    replay = captured(graphed.step)
    rounded = []
    for _ in range(3):
        for p, step in ((param, replay), (other, eager.step)):
            with torch.no_grad():
                p.copy_(start)
            step()
        assert torch.equal(param, other)
        rounded.append(param.detach().cpu().float())
        assert bool(((rounded[-1] - exact).abs() < 2.0**-7).all())
    for a, b in ((0, 1), (1, 2), (0, 2)):
        # Two independent draws of probability 1/4 differ in 2 x 1/4 x 3/4 of the entries; ten standard deviations.
        assert abs(float((rounded[a] != rounded[b]).float().mean()) - 0.375) < 0.08


@needs_gpu
def test_a_first_step_under_capture_is_refused():
    param = nn.Parameter(random(8, 8).to(DEVICE))
    param.grad = random(8, 8, seed=1).to(DEVICE)
    optimizer = SparseMaskedAdamW([param], capturable=True)
    start, other = param.detach().clone(), torch.zeros(1, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        other.add_(1)
        with pytest.raises(RuntimeError, match="(?i)step.*(before|first)|(before|first).*step"):
            optimizer.step()
    assert not optimizer.state[param]
    graph.replay()
    assert torch.equal(param, start) and float(other) == 1
    optimizer.step()
    replay = captured(optimizer.step)
    replay()
    assert int(optimizer.state[param]["step"]) == 2


@needs_gpu
def test_capture_needs_capturable():
    model = Model(torch.float32)
    model.step(0)
    other = torch.zeros(1, device=DEVICE)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        other.add_(1)
        with pytest.raises(RuntimeError, match="capturable is False"):
            model.optimizer.step()


@pytest.mark.parametrize("master", [True, False])
def test_two_optimizers_on_two_streams_give_what_serial_runs_give(master):
    serial, parallel = ([Model(torch.bfloat16, seed=s, master_weights=master) for s in range(2)] for _ in range(2))
    for model in (*serial, *parallel):
        model.give(1)
    streams = new_streams(2)
    # From the first step on, which makes the state.
    for _ in range(20):
        for model, stream in zip(parallel, streams, strict=True):
            with on(stream):
                model.optimizer.step()
    wait()
    for _ in range(20):
        for model in serial:
            model.optimizer.step()
    for first, second in zip(serial, parallel, strict=True):
        assert_same(first.snapshot(), second.snapshot())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_loss_scaling_skips_what_overflows_and_equals_plain_steps(dtype, bad):
    plain, scaled = (Model(dtype, master_weights=False) for _ in range(2))
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=SCALE)
    scaler.scale(torch.ones((), device=DEVICE))  # makes the scale
    plain.step(0)
    scaled.give(0, SCALE)
    scaler.step(scaled.optimizer)
    scaler.update()
    assert_same(plain.snapshot(), scaled.snapshot())

    before = scaled.snapshot()
    scaled.give(1, SCALE)
    scaled.params["columns"].grad[3, 4] = bad
    with no_waiting():
        scaler.step(scaled.optimizer)
        scaler.update()
    assert_same(before, scaled.snapshot())
    assert scaler.get_scale() == SCALE / 2

    plain.step(2)
    scaled.give(2, SCALE / 2)
    with no_waiting():
        scaler.step(scaled.optimizer)
    assert_same(plain.snapshot(), scaled.snapshot())
