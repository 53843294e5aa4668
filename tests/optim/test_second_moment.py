"""One second moment a row: against its formula in float64, what may have it, and how it is saved and carried."""

from __future__ import annotations

import copy

import pytest
import torch
from cases.optimizers import random_mask, unchanged
from cases.optimizers import snapshot as all_of
from cases.rules import gradient, parameter, random, run, subspace
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_cl import ColumnMask, ElasticAdamW, RowMask, SparseMaskedAdamW, protect
from sparse_cl.nn import ActiveLinear

M, N = 24, 32


class RowAdam(torch.optim.Optimizer):
    """The formula, one line each."""

    def __init__(self, params, lr, decay=0.0):
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                s = self.state[p]
                t = s["step"] = s.get("step", 0) + 1
                s["m"] = 0.9 * s.get("m", 0.0) + 0.1 * p.grad
                s["v"] = 0.999 * s.get("v", 0.0) + 0.001 * p.grad.square().mean(1, keepdim=True)
                step = (s["m"] / (1 - 0.9**t)) / ((s["v"] / (1 - 0.999**t)).sqrt() + 1e-8)
                p.copy_(p * (1 - group["lr"] * group["decay"]) - group["lr"] * step)


def rows(weight, steps=5, mask=None, optimizer=SparseMaskedAdamW, **options):
    """An optimizer by row, that has taken some steps."""
    made = optimizer([weight], lr=1e-2, masks={weight: mask} if mask else None, second_moment="row", **options)
    run(made, weight, steps)
    return made


@given(st.integers(1, 9), st.integers(1, 70), st.booleans(), st.integers(0, 3))
def test_it_is_the_formula(m, n, masked, seed):
    weight = nn.Parameter(random(m, n, seed=seed).float())
    active = sorted({0, m - 1, m // 2}) if masked else list(range(m))
    exact = nn.Parameter(weight.detach()[active].double())
    ours = SparseMaskedAdamW(
        [weight],
        lr=1e-2,
        weight_decay=0.1,
        second_moment="row",
        masks={weight: RowMask(active, (m, n))} if masked else {},
    )
    theirs = RowAdam([exact], lr=1e-2, decay=0.1)
    for step in range(5):
        weight.grad = random(m, n, seed=10 * seed + step).float()
        exact.grad = weight.grad[active].double()
        ours.step()
        theirs.step()
    torch.testing.assert_close(weight.detach()[active].double(), exact.detach(), rtol=2e-6, atol=2e-6)
    second = ours.state[weight]["exp_avg_sq"]
    assert second.shape == (len(active), 1)
    torch.testing.assert_close(second.double(), theirs.state[exact]["v"], rtol=1e-5, atol=0)


def test_an_update_keeps_the_direction_of_its_gradients():
    """What an elementwise second moment does not: of inputs in a plane, updates stay in that plane."""
    plane = torch.linalg.qr(random(N, 2)).Q.float()
    for kind, outside in (("row", 1e-5), ("entry", 0.1)):
        weight = parameter()
        start = weight.detach().clone()
        made = SparseMaskedAdamW([weight], lr=1e-2, weight_decay=0.0, second_moment=kind)
        for step in range(10):
            weight.grad = random(M, 2, seed=step).float() @ plane.mT
            made.step()
        change = weight.detach() - start
        share = float((change - change @ plane @ plane.mT).norm() / change.norm())
        assert (share < outside) == (kind == "row")


def test_what_is_no_matrix_or_has_another_mask_has_one_an_entry():
    shapes = {"matrix": (6, 8), "rows": (6, 8), "columns": (6, 8), "2:4": (6, 8), "bias": (6,), "conv": (6, 2, 3)}
    rng = torch.Generator().manual_seed(0)
    masks = {
        "rows": RowMask([1, 3], (6, 8)),
        "columns": ColumnMask([0, 5], (6, 8)),
        "2:4": random_mask("two_four", (6, 8), 0.5, rng),
    }
    found = {}
    for kind in ("row", "entry"):
        params = {name: nn.Parameter(random(*shape).float()) for name, shape in shapes.items()}
        made = SparseMaskedAdamW(params.items(), masks=masks, second_moment=kind)
        for step in range(3):
            for p in params.values():
                p.grad = random(*p.shape, seed=step).float()
            made.step()
        found[kind] = params, made
    params, made = found["row"]
    second = {name: made.state[p]["exp_avg_sq"].shape for name, p in params.items()}
    assert second["matrix"] == (6, 1) and second["rows"] == (2, 1)
    plain, entries = found["entry"]
    for name in ("columns", "2:4", "bias", "conv"):
        assert torch.equal(params[name], plain[name])
        assert second[name] == entries.state[plain[name]]["exp_avg_sq"].shape
    assert made.state_bytes() < entries.state_bytes()
    assert rows(parameter(), amsgrad=True).state_dict()["state"][0]["exp_avg_sq"].shape == (M, N)


@pytest.mark.parametrize("rule", [{"strength": 5.0}, {"budget": 1e-3}, {"budget": 0.0}])
def test_elastic_adamw_has_it_unless_told_otherwise(rule):
    ours, theirs, s = parameter(), parameter(torch.float64), subspace()
    elastic = ElasticAdamW([ours], lr=1e-2, weight_decay=0.1, memory={ours: s}, **rule)
    assert elastic.param_groups[0]["second_moment"] == "row"
    plain = RowAdam([theirs], lr=1e-2, decay=0.1)
    protection = protect(plain, {theirs: subspace(torch.float64)}, **rule)
    run(elastic, ours, 50)
    run(plain, theirs, 50)
    torch.testing.assert_close(ours.detach().double(), theirs.detach(), rtol=0, atol=1e-5)
    protection.remove()


def test_a_checkpoint_goes_on_bit_for_bit():
    weight = parameter(torch.bfloat16)
    made = rows(weight, mask=RowMask([1, 4, 20], (M, N)))
    other = parameter(torch.bfloat16, seed=9)
    with torch.no_grad():
        other.copy_(weight)
    again = SparseMaskedAdamW([other], lr=1e-2, masks={other: RowMask([1, 4, 20], (M, N))}, second_moment="row")
    again.load_state_dict(copy.deepcopy(made.state_dict()))
    for optimizer, p in ((made, weight), (again, other)):
        run(optimizer, p, 5, first=5)
    assert all(torch.equal(a, b) for a, b in zip(all_of(made), all_of(again), strict=True))


def test_second_moments_of_entries_become_their_row_s_mean_and_the_other_way():
    weight = parameter()
    plain = torch.optim.AdamW([weight], lr=1e-2)
    run(plain, weight, 3)
    made = SparseMaskedAdamW([weight], lr=1e-2, second_moment="row")
    made.load_state_dict(plain.state_dict())
    second = plain.state[weight]["exp_avg_sq"]
    assert torch.equal(made.state[weight]["exp_avg_sq"], second.mean(1, keepdim=True))
    made.param_groups[0]["second_moment"] = "entry"
    run(made, weight, 1, first=3)
    expected = 0.999 * second.mean(1, keepdim=True) + 0.001 * gradient(3).float().square()
    torch.testing.assert_close(made.state[weight]["exp_avg_sq"], expected)


def test_a_state_of_an_earlier_version_keeps_this_optimizer_s_choice():
    weight = parameter()
    made = rows(weight)
    old = copy.deepcopy(made.state_dict())
    del old["param_groups"][0]["second_moment"]
    made.load_state_dict(old)
    assert made.param_groups[0]["second_moment"] == "row"


def test_rows_that_stay_keep_their_second_moment_to_the_bit():
    weight = parameter()
    made = rows(weight, mask=RowMask([1, 4, 20], (M, N)))
    before = made.state[weight]["exp_avg_sq"].clone()
    made.set_masks({weight: RowMask([4, 7, 20], (M, N))})
    assert torch.equal(made.state[weight]["exp_avg_sq"], torch.stack([before[1], torch.zeros(1), before[2]]))
    made.set_masks({})
    whole = made.state[weight]["exp_avg_sq"]
    assert torch.equal(whole[[4, 20]], before[1:]) and whole.count_nonzero() == 2
    made.set_masks({weight: RowMask([4], (M, N))})
    assert torch.equal(made.state[weight]["exp_avg_sq"], before[1:2])


def test_entries_that_come_to_a_row_share_its_count():
    weight = parameter()
    made = rows(weight, mask=ColumnMask([0, 5, 6], (M, N)))
    second = made.state[weight]["exp_avg_sq"].clone()
    made.set_masks({})
    state = made.state[weight]
    assert int(state["step"]) == 5 and state["exp_avg_sq"].shape == (M, 1)
    torch.testing.assert_close(state["exp_avg_sq"], second.mean(1, keepdim=True))
    start = weight.detach().clone()
    run(made, weight, 1, first=5)
    moved = (weight.detach() - start).abs()
    # By a count of their own, 1, the new entries would take the second moment they find for a thousandth of one.
    assert moved[:, 7:].max() > 1e-3 and moved.max() < 3e-2


def test_a_leaf_of_an_active_linear():
    mask = RowMask([0, 3, 11], (M, N))
    active, whole = ActiveLinear(N, M, bias=False, mask=mask), nn.Linear(N, M, bias=False)
    whole.load_state_dict({"weight": active.weight})
    leaf = next(p for p in active.parameters() if p.requires_grad)
    ours = SparseMaskedAdamW([leaf], lr=1e-2, second_moment="row")
    theirs = SparseMaskedAdamW([whole.weight], lr=1e-2, masks={whole.weight: mask}, second_moment="row")
    for step in range(4):
        x = random(5, N, seed=step).float()
        for net, optimizer in ((active, ours), (whole, theirs)):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    assert ours.state[leaf]["exp_avg_sq"].shape == (3, 1)
    torch.testing.assert_close(active.weight, whole.weight, rtol=1e-5, atol=1e-6)


def test_another_word_is_refused_and_nothing_is_stepped():
    weight = parameter()
    with pytest.raises(ValueError, match=r"second_moment: expected 'entry' or 'row', got 'column'"):
        SparseMaskedAdamW([weight], second_moment="column")
    made = rows(weight)
    before = all_of(made)
    with pytest.raises(ValueError, match="exp_avg_sq"):
        state = copy.deepcopy(made.state_dict())
        state["state"][0]["exp_avg_sq"] = torch.zeros(M + 1, 1)
        made.load_state_dict(state)
    assert unchanged(before, made)
