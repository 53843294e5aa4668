"""Gradients of every sort: scaled, missing, narrow, strided, no numbers; and clipping."""

import pytest
import torch
from cases.optimizers import SHAPE, as_bytes, model, one, open_entries, random_mask, snapshot, train, unchanged
from torch import nn
from torch.optim import AdamW

from sparse_cl import ColumnMask, ElementMask, RowMask, SparseMaskedAdamW, ops


def scaled_step(scaler, param, opt, grad):
    param.grad = None
    scaler.scale((param * grad).sum()).backward()
    scaler.step(opt)
    scaler.update()


@pytest.mark.parametrize("mask", [None, RowMask([1, 2], SHAPE), ElementMask(torch.eye(6, 8, dtype=torch.bool))])
def test_grad_scaler_unscales_and_skips(implementation, mask):
    param, opt = one(mask)
    same, plain = one(mask)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    rng = torch.Generator().manual_seed(0)
    for t in range(6):
        grad = torch.randn(SHAPE, generator=rng)
        if t == 3:
            before = snapshot(opt)
            scaled_step(scaler, param, opt, torch.full(SHAPE, torch.inf))
            assert unchanged(before, opt)
            assert scaler.get_scale() == 512.0
        scaled_step(scaler, param, opt, grad)
        same.grad = grad
        plain.step()
    assert opt.state[param]["step"].item() == 6
    torch.testing.assert_close(param, same, rtol=1e-6, atol=1e-7)
    assert not hasattr(opt, "grad_scale")
    assert not hasattr(opt, "found_inf")


def test_grad_scaler_after_unscale_divides_once(implementation):
    param, opt = one()
    same, plain = one()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    param.grad = None
    scaler.scale((param * same.grad).sum()).backward()
    scaler.unscale_(opt)
    opt.clip_grad_norm_(1e9)
    scaler.step(opt)
    plain.step()
    torch.testing.assert_close(param, same, rtol=1e-6, atol=1e-7)


def test_one_call_steps_a_whole_group(monkeypatch):
    calls = []
    step = ops.masked_adamw_

    def counted(params, *args):
        calls.append(len(params))
        return step(params, *args)

    monkeypatch.setattr(ops, "masked_adamw_", counted)
    mixed = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    params = [nn.Parameter(torch.ones(SHAPE, dtype=mixed[i % 4])) for i in range(12)]
    masks = [None, RowMask([1], SHAPE), ColumnMask([2], SHAPE), ElementMask(torch.eye(6, 8, dtype=torch.bool))]
    opt = SparseMaskedAdamW(
        [{"params": params[:7]}, {"params": params[7:]}],
        masks={p: masks[i // 3] for i, p in enumerate(params) if masks[i // 3] is not None},
    )
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        opt.step()
    assert calls == [7, 5, 7, 5]
    assert all((p != 1).any() for p in params)
    for p in params:
        assert opt.state[p]["exp_avg"].dtype == (torch.float64 if p.dtype == torch.float64 else torch.float32)


def test_parameters_without_gradient_elements_or_active_entries(implementation):
    params = [nn.Parameter(torch.ones(s)) for s in ((4, 4), (0, 4), (4, 4), ())]
    opt = SparseMaskedAdamW(params, masks={params[2]: RowMask([], (4, 4))})
    opt.step()
    assert not any(opt.state.values())
    params[3].grad = torch.ones(())
    opt.step()
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    params[3].grad = None
    opt.step()
    steps = {i: opt.state[p]["step"].item() for i, p in enumerate(params) if opt.state.get(p)}
    assert steps == {0: 2, 3: 2}
    assert torch.equal(params[2], torch.ones(4, 4))


def test_a_parameter_that_is_frozen_later_stays():
    net = model()
    opt = SparseMaskedAdamW(net.parameters())
    train(net, opt, 1)
    net[0].requires_grad_(False)
    before = net[0].weight.detach().clone()
    train(net, opt, 2)
    assert torch.equal(net[0].weight, before)
    net[0].requires_grad_(True)
    train(net, opt, 1)
    assert opt.state[net[0].weight]["step"].item() == 2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["dense", "rows", "columns", "elements", "two_four"])
def test_gradients_that_are_no_numbers_do_as_in_adamw_and_spare_frozen_entries(implementation, kind, bad):
    mask = random_mask(kind, SHAPE, 0.5, torch.Generator().manual_seed(0))
    param, opt = one(mask)
    start, other = param.detach().clone(), nn.Parameter(param.detach().clone())
    theirs = AdamW([other], foreach=False)
    for t in range(3):
        grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(t))
        grad[::2, ::3] = bad
        param.grad, other.grad = grad.clone(), grad.clone()
        opt.step()
        theirs.step()
    active = open_entries(mask, SHAPE)
    torch.testing.assert_close(param[active], other[active], rtol=1e-6, atol=1e-7, equal_nan=True)
    assert torch.equal(as_bytes(param[~active]), as_bytes(start[~active]))


@pytest.mark.parametrize("kind", ["dense", "rows", "columns", "elements"])
def test_strided_parameters(implementation, kind):
    mask = random_mask(kind, SHAPE, 0.5, torch.Generator().manual_seed(0))
    param, opt = one(mask)
    strided = nn.Parameter(param.detach().t().contiguous().t())
    strided.grad = param.grad.t().contiguous().t()
    twin = SparseMaskedAdamW([strided], masks={strided: mask} if mask else None)
    for _ in range(3):
        opt.step()
        twin.step()
    assert not strided.is_contiguous()
    assert torch.equal(strided, param)


def test_float32_gradients_of_narrow_parameters(implementation):
    param, opt = one(RowMask([0, 3], SHAPE), torch.bfloat16)
    param.grad = None
    param.grad_dtype = torch.float32
    param.grad = torch.full(SHAPE, 1 + 2.0**-12)
    opt.step()
    assert (opt.state[param]["exp_avg"] == torch.tensor(0.1 * (1 + 2.0**-12))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping_sees_active_entries_only(dtype, max_norm):
    rng = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.ones(SHAPE, dtype=dtype)) for _ in range(6)]
    masks = [random_mask(k, SHAPE, 0.5, rng) for k in ("dense", "rows", "columns", "elements", "two_four", "dense")]
    opt = SparseMaskedAdamW(params, masks={p: m for p, m in zip(params, masks, strict=True) if m})
    twins = [nn.Parameter(torch.ones(SHAPE, dtype=dtype)) for _ in params]
    for i, (p, twin, mask) in enumerate(zip(params, twins, masks, strict=True)):
        grad = torch.randn(SHAPE, generator=rng).to(dtype)
        p.grad = grad.clone() if i != 3 else grad.t().contiguous().t()
        twin.grad = grad * open_entries(mask, SHAPE)
    params[5].grad = twins[5].grad = None
    before = [None if p.grad is None else p.grad.clone() for p in params]
    norm = opt.clip_grad_norm_(max_norm)
    expected = nn.utils.clip_grad_norm_(twins, max_norm)
    rtol = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(norm, expected.float(), rtol=rtol, atol=0)
    for p, twin, mask, old in zip(params[:5], twins, masks, before, strict=False):
        active = open_entries(mask, SHAPE)
        assert torch.equal(as_bytes(p.grad[~active]), as_bytes(old[~active]))
        if norm < max_norm:
            assert torch.equal(p.grad, old)
        else:
            # torch takes the norm of narrow gradients in their own dtype.
            torch.testing.assert_close(p.grad[active].float(), twin.grad[active].float(), rtol=rtol, atol=1e-8)


def test_clipping_ignores_what_inactive_entries_hold():
    param, opt = one(RowMask([1], SHAPE))
    param.grad[0] = torch.nan
    assert opt.clip_grad_norm_(1.0).isfinite()
    assert param.grad[0].isnan().all()
    assert param.grad[1].norm() <= 1.0 + 1e-6


def test_clipping_nothing():
    param, opt = one(RowMask([], SHAPE))
    assert opt.clip_grad_norm_(1.0).item() == 0.0
    param.grad = None
    assert opt.clip_grad_norm_(1.0).item() == 0.0


def test_clipping_before_any_step_goes_by_the_masks_in_force():
    param, opt = one(RowMask([1], SHAPE))
    opt.set_masks({param: ColumnMask([2, 3], SHAPE)})
    expected = param.grad[:, 2:4].norm()
    torch.testing.assert_close(opt.clip_grad_norm_(1e9), expected)
    opt.set_masks({param: ElementMask(torch.eye(6, 8, dtype=torch.bool))})
    torch.testing.assert_close(opt.clip_grad_norm_(1e9), param.grad.diag().norm())
    opt.step()
    opt.set_masks({})
    torch.testing.assert_close(opt.clip_grad_norm_(1e9), param.grad.norm())


def test_clipping_groups_of_several_dtypes(implementation):
    dtypes = (torch.float64, torch.bfloat16, torch.float32, torch.float16)
    params = [nn.Parameter(torch.ones(SHAPE, dtype=dtype)) for dtype in dtypes]
    opt = SparseMaskedAdamW([{"params": params[:1]}, {"params": params[1:3]}, {"params": params[3:]}])
    for p in params:
        p.grad = torch.ones_like(p)
    norm = opt.clip_grad_norm_(0.5)
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx((4 * 48) ** 0.5, rel=1e-7)  # that of the narrow ones is a float32
    factor = 0.5 / (norm + 1e-6)
    for p in params:
        assert (p.grad == (factor if p.dtype == torch.float64 else factor.float()).to(p.dtype)).all()


def test_clipping_refuses_what_a_step_refuses():
    param, opt = one(RowMask([1], SHAPE))
    other, loaded = one(RowMask([2], SHAPE))
    opt.step()
    loaded.load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match="call set_masks"):
        loaded.clip_grad_norm_(1.0)
    before = param.grad.clone()
    param.grad.resize_(4, 4)
    with pytest.raises(ValueError, match="number 0 of group 0: its gradient has shape"):
        opt.clip_grad_norm_(1.0)
    assert torch.equal(param.grad.view(-1), before.view(-1)[:16])
