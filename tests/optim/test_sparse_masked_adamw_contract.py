"""What torch.optim promises of every optimizer, kept by SparseMaskedAdamW."""

import copy
import gc
import weakref

import pytest
import torch
from cases.optimizers import SHAPE, model, one, train
from torch.optim import AdamW, lr_scheduler

from sparse_cl import ColumnMask, RowMask, SparseMaskedAdamW


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
    buffer = weakref.ref(opt._store.packed[param].buffer)
    moment = opt.state[param]["exp_avg"]
    expected = moment.clone()
    del opt
    gc.collect()
    assert buffer() is None
    # A tensor taken out of the state keeps its memory.
    assert torch.equal(moment, expected)


def test_a_parameter_put_into_a_group_is_the_one_that_is_stepped(implementation):
    first, second = (torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    optimizer = SparseMaskedAdamW([first], lr=0.1)
    for p in (first, second):
        p.grad = torch.ones(3, 4)
    optimizer.step()
    kept = first.detach().clone()
    optimizer.param_groups[0]["params"][0] = second
    optimizer.step()
    assert torch.equal(first.detach(), kept)
    assert (second < 1).all()


def test_a_step_between_two_backward_passes_of_one_graph_is_noticed(implementation):
    weight = torch.nn.Parameter(torch.ones(3, 4))
    x = torch.ones(2, 4, requires_grad=True)
    optimizer = SparseMaskedAdamW([weight], lr=0.1)
    loss = (x @ weight.T).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
