"""active_norm and scale_active_ on a GPU, and clipping by them."""

from dataclasses import replace

import cases.clip_grad as cases
import pytest
import torch
from cases.adamw import FLOAT_GRADIENTS, SAME_DTYPES, Case, bits, kinds
from torch import nn

from sparse_cl import ColumnMask, ElementMask, RowMask, SparseMaskedAdamW, TwoFourMask, ops
from sparse_cl.layout import COLUMNS, DENSE, ELEMENTS, ROWS, TWO_FOUR

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and ops.LOADED["cuda"]), reason="needs a GPU and the CUDA library"
)

PAIR = ops.active_norm, ops.scale_active_


@pytest.mark.parametrize("options", cases.OPTIONS.values(), ids=cases.OPTIONS)
@pytest.mark.parametrize("dtype", SAME_DTYPES.values(), ids=SAME_DTYPES)
def test_active_entries_count_and_are_scaled(dtype, options):
    cases.check(*PAIR, cases.all_cases(dtype, None, options), "cuda")


@pytest.mark.parametrize("dtype", FLOAT_GRADIENTS.values(), ids=FLOAT_GRADIENTS)
def test_float32_gradients(dtype):
    cases.check(*PAIR, cases.all_cases(dtype, torch.float32, {}), "cuda")


@pytest.mark.parametrize("dtype", SAME_DTYPES.values(), ids=SAME_DTYPES)
def test_sizes_past_the_cache(dtype):
    large = [
        Case(DENSE, (4096, 4099)),
        Case(ROWS, (14336, 1024), density=0.05),
        Case(ROWS, (3001, 4097), density=0.3),
        Case(COLUMNS, (2048, 7168), density=0.1),
        Case(ELEMENTS, (4096, 2053), density=0.05),
        Case(ELEMENTS, (4096, 4096), density=1e-5),
        Case(TWO_FOUR, (2048, 4100)),
    ]
    cases.check(*PAIR, [replace(case, dtype=dtype) for case in (*large, *cases.LARGE)], "cuda")


def test_tasks_past_one_launch():
    drawn = [Case(kind, (3, 4)) for kind in (DENSE, ROWS, COLUMNS, ELEMENTS, TWO_FOUR) for _ in range(150)]
    cases.check(*PAIR, drawn, "cuda")


def test_nothing_is_active():
    problem = cases.check(*PAIR, cases.EMPTY, "cuda")
    assert PAIR[0](problem.grads, problem.states, cases.rows_of(problem)).item() == 0


def test_repeats_to_the_bit():
    problem = cases.poisoned([*cases.LARGE, *kinds(torch.bfloat16)], "cuda")
    norms = [PAIR[0](problem.grads, problem.states, cases.rows_of(problem)) for _ in range(5)]
    assert all(torch.equal(norm, norms[0]) for norm in norms)


def clipping_optimizer(device: str = "cuda"):
    """An optimizer with masks of all kinds, made on the CPU, and gradients of its parameters."""
    rng = torch.Generator().manual_seed(0)
    shape = (96, 128)
    order = torch.rand(96 * 32, 4, generator=rng).argsort(1)
    masks = [
        None,
        RowMask([1, 7, 40], shape),
        ColumnMask([0, 5, 100], shape),
        ElementMask(torch.rand(shape, generator=rng) < 0.1),
        TwoFourMask((order < 2).view(shape)),
    ] * 2
    params = [
        nn.Parameter(torch.randn(shape, generator=rng).to(device, torch.bfloat16 if i < 5 else torch.float32))
        for i in range(len(masks))
    ]
    for param in params:
        param.grad = torch.randn(shape, generator=rng).to(param)
    return params, SparseMaskedAdamW(params, masks={p: m for p, m in zip(params, masks, strict=True) if m is not None})


def test_clipping_does_not_synchronize_and_agrees_with_the_cpu():
    params, optimizer = clipping_optimizer()
    others, theirs = clipping_optimizer("cpu")
    expected = theirs.clip_grad_norm_(1.0)
    grads = [p.grad.clone() for p in params]
    optimizer.clip_grad_norm_(1.0)  # makes the states
    for p, grad in zip(params, grads, strict=True):
        p.grad.copy_(grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = optimizer.clip_grad_norm_(1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norm.device == params[0].device
    torch.testing.assert_close(norm.cpu(), expected, rtol=1e-6, atol=0)
    for p, other in zip(params, others, strict=True):
        tolerance = 2 * torch.finfo(p.dtype).eps
        torch.testing.assert_close(p.grad.cpu(), other.grad, rtol=tolerance, atol=0)


def test_clipping_and_a_step_replay_as_they_run():
    params, optimizer = clipping_optimizer()
    others, theirs = clipping_optimizer()
    first = [p.grad.clone() for p in params]

    def run(of, mine):
        for p, grad in zip(of, first, strict=True):
            p.grad.copy_(grad)
        norm = mine.clip_grad_norm_(1.0)
        mine.step()
        return norm

    for of, mine in ((params, optimizer), (others, theirs)):
        for group in mine.param_groups:
            group["capturable"] = True
        run(of, mine)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(params, optimizer)
    for scale in (1.0, 1e-4, 3.0):
        for grad in first:
            grad.mul_(scale)
        graph.replay()
        assert torch.equal(captured, run(others, theirs))
    for a, b in zip(params, others, strict=True):
        assert torch.equal(bits(a.detach()), bits(b.detach()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gradients_on_two_devices():
    params = [nn.Parameter(torch.zeros(64, 64, device=f"cuda:{i % 2}")) for i in range(4)]
    for p in params:
        p.grad = torch.ones_like(p)
    norm = SparseMaskedAdamW(params).clip_grad_norm_(1.0)
    assert norm.device == params[0].device and norm.item() == 128
    assert all(torch.allclose(p.grad, torch.full_like(p.grad, 1 / 128)) for p in params)
    assert torch.cuda.current_device() == 0
