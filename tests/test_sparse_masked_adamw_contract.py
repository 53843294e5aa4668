"""What torch.optim promises of every optimizer, kept by SparseMaskedAdamW."""

import copy
import gc
import weakref

import pytest
import torch
from test_sparse_masked_adamw import as_bytes, open_entries, random_mask
from torch import nn
from torch.optim import AdamW, lr_scheduler

from sparse_cl import ColumnMask, ElementMask, RowMask, SparseMaskedAdamW, ops

SHAPE = (6, 8)


def one(mask=None, dtype=torch.float32, **options):
    """A parameter with a gradient, and its optimizer."""
    param = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype))
    param.grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)
    return param, SparseMaskedAdamW([param], masks={param: mask} if mask else None, **options)


def snapshot(opt):
    """Copies of all parameters and all state, as bytes."""
    params = [as_bytes(p).clone() for g in opt.param_groups for p in g["params"]]
    return params + [as_bytes(v).clone() for s in opt.state.values() for v in s.values()]


def unchanged(before, opt):
    after = snapshot(opt)
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8)).to(dtype)


def train(net, opt, steps, seed=0):
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(5, 8, generator=rng).to(next(net.parameters()).dtype)
        opt.zero_grad()
        (net(x) - x).float().square().mean().backward()
        opt.step()


def test_masks_by_name_by_parameter_and_as_a_property(implementation):
    net = model()
    mask = RowMask([1, 4], (6, 8))
    named = SparseMaskedAdamW(net.named_parameters(), masks={"0.weight": mask})
    assert named.masks == {"0.weight": mask}
    mixed = SparseMaskedAdamW(net.named_parameters(), masks={net[0].weight: mask, "0.bias": RowMask([0], (6,))})
    assert list(mixed.masks) == ["0.weight", "0.bias"]
    plain = SparseMaskedAdamW(net.parameters(), masks={net[0].weight: mask})
    assert plain.masks == {net[0].weight: mask}
    before = net[0].weight.detach().clone()
    train(net, named, 3)
    changed = (net[0].weight != before).any(1)
    assert changed.tolist() == [False, True, False, False, True, False]


def test_groups_have_their_own_hyperparameters(implementation):
    net = model()
    other = copy.deepcopy(net)
    settings = [{"lr": 0.1, "weight_decay": 0.5}, {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-3, "amsgrad": True}]
    groups = [
        [{"params": layer.parameters(), **s} for layer, s in zip((m[0], m[2]), settings, strict=True)]
        for m in (net, other)
    ]
    mine, theirs = SparseMaskedAdamW(groups[0], lr=7.0), AdamW(groups[1], lr=7.0)
    train(net, mine, 10)
    train(other, theirs, 10)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_group_is_added_later(implementation):
    net = model()
    opt = SparseMaskedAdamW(net[0].named_parameters(prefix="0"), masks={"0.weight": RowMask([1], (6, 8))})
    train(net, opt, 2)
    opt.add_param_group({"params": net[2].named_parameters(prefix="2"), "lr": 0.5})
    opt.set_masks({**opt.masks, "2.weight": ColumnMask([2], (8, 6))})
    before = net[2].weight.detach().clone()
    train(net, opt, 2)
    assert (net[2].weight != before).any(0).tolist() == [False, False, True, False, False, False]
    assert opt.state[net[0].weight]["step"].item() == 4
    assert opt.state[net[2].weight]["step"].item() == 2
    assert opt.param_groups[1]["lr"] == 0.5


def test_a_closure_is_evaluated_with_gradients(implementation):
    param, opt = one()
    seen = []

    def closure():
        seen.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    expected = (param**2).sum().item()
    assert opt.step(closure).item() == expected
    assert opt.step() is None
    assert seen == [True]


def test_hooks_run_in_their_order():
    _, opt = one(RowMask([1], SHAPE))
    log = []
    opt.register_step_pre_hook(lambda *args: log.append("before step"))
    opt.register_step_post_hook(lambda *args: log.append("after step"))
    opt.register_state_dict_pre_hook(lambda *args: log.append("before save"))
    opt.register_state_dict_post_hook(lambda o, state: {**state, "mark": 1})
    opt.register_load_state_dict_pre_hook(lambda o, state: log.append(f"before load {state['mark']}"))
    opt.register_load_state_dict_post_hook(
        lambda o: log.append(f"after load {o.state[o.param_groups[0]['params'][0]]['step'].item()}")
    )
    opt.step()
    state = copy.deepcopy(opt.state_dict())
    opt.step()
    opt.load_state_dict(state)
    assert log == [
        "before step",
        "after step",
        "before save",
        "before step",
        "after step",
        "before load 1",
        "after load 1",
    ]
    # Those that loading needs for itself are gone again.
    assert len(opt._optimizer_load_state_dict_pre_hooks) == len(opt._optimizer_load_state_dict_post_hooks) == 1


def test_a_pre_hook_may_replace_the_state_dict():
    param, opt = one(RowMask([1], SHAPE))
    opt.step()
    state = copy.deepcopy(opt.state_dict())
    opt.register_load_state_dict_pre_hook(lambda o, given: given["inner"])
    opt.step()
    opt.load_state_dict({"inner": state})
    assert opt.state[param]["step"].item() == 1


def test_zero_grad():
    param, opt = one()
    opt.zero_grad(set_to_none=False)
    assert not param.grad.any()
    opt.zero_grad()
    assert param.grad is None


SCHEDULERS = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 3),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 5]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.5, 4),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, total_iters=5),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 8),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 7),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 4),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 1 / (1 + epoch)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda epoch: 0.8),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=12),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 1e-3, 1e-1, step_size_up=3),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.5)], [4]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_learning_rate_schedulers(make, tensor_lr):
    net, other = model(), model()
    mine = SparseMaskedAdamW(net.parameters(), lr=torch.tensor(0.05) if tensor_lr else 0.05)
    theirs = AdamW(other.parameters(), lr=torch.tensor(0.05) if tensor_lr else 0.05, foreach=False)
    schedules = make(mine), make(theirs)
    for t in range(10):
        for n, opt, schedule in zip((net, other), (mine, theirs), schedules, strict=True):
            train(n, opt, 1, seed=t)
            schedule.step(*[1.0] * isinstance(schedule, lr_scheduler.ReduceLROnPlateau))
        assert float(mine.param_groups[0]["lr"]) == float(theirs.param_groups[0]["lr"])
        assert mine.param_groups[0]["betas"] == theirs.param_groups[0]["betas"]
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_swa_and_gradient_accumulation_need_nothing_special():
    net, opt = model(), None
    opt = SparseMaskedAdamW(net.parameters(), lr=0.1)
    schedule = torch.optim.swa_utils.SWALR(opt, swa_lr=0.01, anneal_epochs=2)
    for _ in range(3):
        train(net, opt, 1)
        schedule.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0.01)


# GradScaler.


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


# Gradients and parameters of every sort.


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


# Clipping.


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


# State.


def test_replaced_state_is_honoured(implementation):
    mask = RowMask([1, 2], SHAPE)
    param, opt = one(mask)
    twin, plain = one(mask)
    for o in (opt, plain):
        o.step()
    state = opt.state[param]
    for name in list(state):
        state[name] = state[name].clone()
    state["exp_avg"] = state["exp_avg"].double().t().contiguous().t()
    opt.step()
    plain.step()
    assert torch.equal(param, twin)
    # And what is now in the state is what the next step reads.
    opt.state[param]["exp_avg"].zero_()
    opt.state[param]["step"].fill_(7)
    opt.step()
    assert opt.state[param]["step"].item() == 8
    torch.testing.assert_close(opt.state[param]["exp_avg"], 0.1 * param.grad[1:3])


def test_cleared_state_starts_anew(implementation):
    param, opt = one()
    opt.step()
    opt.step()
    opt.state.clear()
    opt.step()
    assert opt.state[param]["step"].item() == 1
    del opt.state[param]["exp_avg"]
    with pytest.raises(ValueError, match="number 0 of group 0: state has no exp_avg"):
        opt.step()


def test_amsgrad_and_master_weights_are_switched_in_a_group(implementation):
    param, opt = one(RowMask([1, 2], SHAPE), torch.bfloat16, master_weights=False)
    opt.step()
    second = opt.state[param]["exp_avg_sq"].clone()
    opt.param_groups[0]["amsgrad"] = True
    opt.param_groups[0]["master_weights"] = True
    value = param.detach()[1:3].float()
    param.grad = torch.zeros_like(param)
    opt.step()
    state = opt.state[param]
    assert torch.equal(state["max_exp_avg_sq"], second)
    assert torch.equal(param[1:3], state["master"].bfloat16())
    assert (state["master"] != value).any()
    assert state["step"].item() == 2
    opt.param_groups[0]["amsgrad"] = opt.param_groups[0]["master_weights"] = False
    opt.step()
    assert state.keys() - opt.state[param].keys() == {"max_exp_avg_sq", "master"}
    assert opt.state[param]["step"].item() == 3


def test_a_master_keeps_what_the_parameter_cannot_hold(implementation):
    param, opt = one(dtype=torch.bfloat16, lr=1e-5, weight_decay=0.0)
    param.data.fill_(1.0)
    param.grad = torch.ones_like(param)
    for _ in range(600):
        opt.step()
    torch.testing.assert_close(opt.state[param]["master"], torch.full(SHAPE, 1 - 600e-5), rtol=1e-5, atol=0)
    assert torch.equal(param, opt.state[param]["master"].bfloat16())


def test_an_optimizer_leaves_nothing_behind():
    param, opt = one(RowMask([1], SHAPE))
    opt.step()
    buffer = weakref.ref(opt._packed[param].buffer)
    moment = opt.state[param]["exp_avg"]
    expected = moment.clone()
    del opt
    gc.collect()
    assert buffer() is None
    # A tensor taken out of the state keeps its memory.
    assert torch.equal(moment, expected)
