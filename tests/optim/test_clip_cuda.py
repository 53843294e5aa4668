"""Clipping by the norm of active entries, on a GPU."""

import pytest
import torch
from cases.adamw import bits
from cases.cuda_device import DEVICE, Model, needs_device, no_waiting

pytestmark = needs_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def active_grads(model):
    """Of each parameter: its gradient on the CPU, and where it is active."""
    names = [*model.params, "layer.active"]
    return {name: (p.grad.cpu().clone(), ~model.frozen(name)) for name, p in zip(names, model.trained, strict=True)}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_clips_to_the_oracle_s_norm_without_waiting(dtype):
    """By masks that were made on the CPU; what they close keeps its bits, infinite or not."""
    model = Model(dtype)
    model.step(0)
    model.give(1)
    for name, p in model.params.items():
        where = model.frozen(name).nonzero()[:2]
        for (row, column), value in zip(where.tolist(), (float("inf"), float("nan")), strict=False):
            p.grad[row, column] = value
    before = active_grads(model)
    squares = sum(grad[active].double().square().sum() for grad, active in before.values())
    for max_norm in (1e6, 3.0):
        with no_waiting():
            norm = model.optimizer.clip_grad_norm_(max_norm)
        assert norm.device == DEVICE and norm.dim() == 0
        assert float(norm) == pytest.approx(float(squares.sqrt()), rel=1e-5)
        factor = min(1.0, max_norm / float(squares.sqrt()))
        for name, (after, active) in active_grads(model).items():
            grad = before[name][0]
            assert torch.equal(bits(after[~active]), bits(grad[~active])), name
            if factor == 1:
                assert torch.equal(bits(after), bits(grad)), name
            expected = grad[active].double() * factor
            rounding = 1e-5 + torch.finfo(after.dtype).eps
            smallest = torch.finfo(after.dtype).smallest_normal * rounding
            assert bool(((after[active] - expected).abs() <= rounding * expected.abs() + smallest).all()), name


def test_the_norm_before_the_first_step_is_the_same():
    first, later = Model(torch.float32), Model(torch.float32)
    later.step(0)
    norms = []
    for model in (first, later):
        model.give(1)
        norms.append(float(model.optimizer.clip_grad_norm_(2.0)))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for name, (grad, _) in active_grads(first).items():
        torch.testing.assert_close(grad, active_grads(later)[name][0], rtol=1e-6, atol=0, msg=name)
