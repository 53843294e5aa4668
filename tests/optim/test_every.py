"""A correction after every k-th step only: the three rules, for all that the weights have moved until then."""

from __future__ import annotations

import copy

import pytest
import torch
from cases.rules import M, N, Oracle, basis, drift, follow, gradient, parameter, rms, run, stepped, subspace
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_cl import (
    ColumnMask,
    ElasticAdamW,
    ElementMask,
    LowRankPull,
    RowMask,
    SparseMaskedAdamW,
    SubspaceProjectedAdamW,
    protect,
)

ORIGIN = "projection.origin"
GIVEN = {"hard": {"budget": 0.0}, "pull": {"strength": 5.0}, "budget": {"budget": 1e-3}}


def given(rule, s, weight):
    """So that the pull's strengths are the energies, as the oracle's are."""
    return {"strength": rms(weight) * s.mean} if rule == "pull" else GIVEN[rule]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", GIVEN)
def test_every_fourth_step_of_a_schedule(rule, dtype):
    s = subspace(torch.float64 if dtype == torch.float64 else torch.float32)
    weight = parameter(dtype)
    oracle = Oracle(rule, weight, s, every=4)
    optimizer = ElasticAdamW(
        [weight],
        lr=1e-2,
        weight_decay=0.1,
        memory={weight: s},
        every=4,
        **given(rule, s, weight),
        second_moment="entry",
    )

    def look():
        ours = stepped(optimizer, weight)
        assert (ours - oracle.w).abs().max() <= (1e-10 if dtype == torch.float64 else 2e-5) * oracle.w.abs().max()
        said = optimizer.old_output_drift()["number 0 of group 0"]
        assert said == pytest.approx(drift(ours, oracle.start, s), rel=1e-3, abs=1e-9)

    follow(optimizer, oracle, weight, look)
    if dtype == torch.bfloat16:
        assert torch.equal(weight.detach(), stepped(optimizer, weight).to(dtype))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("rule", GIVEN)
def test_it_is_protect_behind_adamw(rule, every):
    ours, theirs, s = parameter(), parameter(), subspace()
    fused = ElasticAdamW(
        [ours], lr=1e-2, weight_decay=0.1, memory={ours: s}, every=every, **GIVEN[rule], second_moment="entry"
    )
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    protection = protect(optimizer, {theirs: s}, every=every, **GIVEN[rule])
    for step in range(20):
        run(fused, ours, 1, first=step)
        run(optimizer, theirs, 1, first=step)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
        said, expected = (next(iter(x.old_output_drift().values())) for x in (protection, fused))
        assert said == pytest.approx(expected, rel=2e-3, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hard_rule_leaks_no_more_than_in_every_step(dtype):
    weight, s = parameter(dtype), subspace()
    start = weight.detach().double().clone()
    optimizer = SubspaceProjectedAdamW([weight], lr=1e-2, memory={weight: s}, every=4)
    run(optimizer, weight, 52)
    change = stepped(optimizer, weight) - start
    assert (change @ basis()).square().sum() <= 1e-6 * change.square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["hard", "pull"])
def test_a_row_mask_is_the_rule_of_its_rows(rule, dtype):
    rows = [1, 4, 7, 8]
    masked, dense, s = parameter(dtype), torch.nn.Parameter(parameter(dtype).detach()[rows].clone()), subspace()
    masks = {masked: RowMask(rows, (M, N))}
    ours = ElasticAdamW([masked], lr=1e-2, memory={masked: s}, every=3, masks=masks, **given(rule, s, masked))
    plain = ElasticAdamW([dense], lr=1e-2, memory={dense: s}, every=3, **given(rule, s, dense))
    before = masked.detach().clone()
    for step in range(7):
        masked.grad = gradient(step).to(dtype)
        dense.grad = masked.grad[rows]
        ours.step()
        plain.step()
    torch.testing.assert_close(
        stepped(ours, masked)[slice(None) if dtype == torch.bfloat16 else rows],
        stepped(plain, dense),
        rtol=0,
        atol=2e-6,
    )
    others = [i for i in range(M) if i not in rows]
    assert torch.equal(masked.detach()[others], before[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_column_mask_is_the_rule_of_what_its_columns_see(dtype):
    columns, s = list(range(3, 20)), subspace()
    weight = parameter(dtype)
    start = weight.detach().double().clone()
    masks = {weight: ColumnMask(columns, (M, N))}
    optimizer = ElasticAdamW([weight], lr=1e-2, memory={weight: s}, every=2, masks=masks, **given("pull", s, weight))
    plain = torch.nn.Parameter(start[:, columns].clone())
    adam = torch.optim.AdamW([plain], lr=1e-2)
    for step in range(2):
        weight.grad = gradient(step).to(dtype)
        plain.grad = weight.grad.double()[:, columns]
        optimizer.step()
        adam.step()
    u, moved = s.basis.double()[columns], plain.detach() - start[:, columns]
    system = torch.eye(len(columns), dtype=torch.float64) + 2e-2 * (u * s.values.double()) @ u.mT
    expected = torch.linalg.solve(system, moved.mT).mT
    ours = stepped(optimizer, weight)[:, slice(None) if dtype == torch.bfloat16 else columns]
    torch.testing.assert_close(ours - start[:, columns], expected, rtol=0, atol=2e-6)
    others = [i for i in range(N) if i not in columns]
    assert torch.equal(weight.detach().double()[:, others], start[:, others])


def test_a_budget_holds_after_every_second_step_when_the_rows_change():
    weight, s = parameter(), subspace()
    start, spent = weight.detach().double().clone(), []
    optimizer = ElasticAdamW([weight], lr=3e-2, memory={weight: s}, budget=1e-4, every=2)
    for rows in ([0, 1, 2, 3], [2, 3, 9, 10], [0, 20]):
        optimizer.set_masks({weight: RowMask(rows, (M, N))})
        run(optimizer, weight, 8, each=lambda _: spent.append(drift(weight.detach(), start, s)))
    assert max(spent[1::2]) <= 1e-4 * (1 + 1e-4)
    assert max(spent) > 1e-4


@pytest.mark.parametrize("resumes", [False, True])
def test_what_has_no_gradient_in_the_corrected_step_is_corrected_too(resumes):
    """Two heads take a batch each in turn; a third weight had its last gradient long ago."""
    weights, s = [parameter(seed=seed) for seed in (2, 3, 4)], subspace()
    starts = [weight.detach().double().clone() for weight in weights]
    make = {"lr": 3e-2, "memory": dict.fromkeys("abc", s), "budget": 1e-4, "every": 2}
    optimizer = ElasticAdamW(list(zip("abc", weights, strict=True)), **make)
    for step in range(12):
        if step == 7 and resumes:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = ElasticAdamW(list(zip("abc", weights, strict=True)), **make)
            optimizer.load_state_dict(state)
        for number, weight in enumerate(weights):
            weight.grad = gradient(step).float() if number == step % 2 or (number == 2 and step < 2) else None
        before = weights[2].detach().clone()
        optimizer.step()
        assert step < 2 or torch.equal(before, weights[2])
        if step % 2:
            for weight, start in zip(weights, starts, strict=True):
                assert 0 < drift(weight.detach(), start, s) <= 1e-4 * (1 + 1e-4)


def test_a_group_that_gets_no_more_gradients_is_corrected_once_more():
    first, second, s = parameter(), parameter(seed=3), subspace()
    start = first.detach().double().clone()
    groups = [{"params": [("a", first)]}, {"params": [("b", second)]}]
    optimizer = ElasticAdamW(groups, lr=3e-2, memory=dict.fromkeys("ab", s), budget=1e-4, every=2)
    for step in range(8):
        first.grad = gradient(step).float() if step < 5 else None
        second.grad = gradient(step).float()
        optimizer.step()
        if step % 2:
            assert 0 < drift(first.detach(), start, s) <= 1e-4 * (1 + 1e-4)


@pytest.mark.parametrize("every", [(1, 4), (4, 1)])
def test_a_checkpoint_of_another_every_is_refused(every):
    weight, s = parameter(), subspace()
    first, second = (ElasticAdamW([weight], memory={weight: s}, every=k, **GIVEN["budget"]) for k in every)
    run(first, weight, 3)
    second.load_state_dict(first.state_dict())
    before = weight.detach().clone()
    with pytest.raises(ValueError, match="it was made with another `every`"):
        run(second, weight, 1)
    assert torch.equal(weight, before)


def test_a_budget_on_16_bits_without_a_master_wants_the_weights_to_be_read():
    weight, s = parameter(torch.bfloat16), subspace()
    start, make = weight.detach().double().clone(), {"lr": 1e-2, "memory": {"w": s}, "master_weights": False}
    with pytest.raises(ValueError, match="torch.bfloat16 without a master, .* take master_weights=True, or every=2"):
        run(ElasticAdamW([("w", weight)], budget=1e-3, **make), weight, 1)
    assert torch.equal(weight.double(), start)
    run(ElasticAdamW([("w", weight)], budget=1e-3, every=2, **make), weight, 100)
    assert drift(weight.detach(), start, s) == pytest.approx(1e-3, rel=0.2)  # rounding of one step


def test_a_skipped_step_adds_no_rate():
    weight, s = parameter(), subspace()
    oracle = Oracle("pull", weight, s, decay=0.01, every=2)
    optimizer = ElasticAdamW(
        [weight], lr=1e-2, memory={weight: s}, every=3, **given("pull", s, weight), second_moment="entry"
    )
    for step, skipped in enumerate((0.0, 1.0, 0.0)):
        weight.grad = torch.full((M, N), torch.nan) if skipped else gradient(step).float()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor([skipped])
        optimizer.step()
        if not skipped:
            oracle.step(gradient(step), 1e-2)
    torch.testing.assert_close(weight.detach().double(), oracle.w, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_between_two_corrections_goes_on_with_the_same_bits(dtype, tmp_path):
    first, s = parameter(dtype), subspace()
    make = {"lr": 1e-2, "memory": {"w": s}, "every": 4, **GIVEN["pull"]}
    optimizer = ElasticAdamW([("w", first)], **make)
    run(optimizer, first, 6)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    second = torch.nn.Parameter(first.detach().clone())
    resumed = ElasticAdamW([("w", second)], **make)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    copied = copy.deepcopy(resumed)
    (third,) = copied.param_groups[0]["params"]
    assert copied.old_output_drift() == resumed.old_output_drift()
    for each, weight in ((optimizer, first), (resumed, second), (copied, third)):
        assert each.state[weight][ORIGIN].dtype == torch.float32
        run(each, weight, 3, first=6)
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_a_protection_goes_on_between_two_corrections():
    ends, s = [], subspace()
    for resumes in (False, True):
        weight = parameter()
        optimizer = torch.optim.SGD([weight], lr=1e-2)
        protection = protect(optimizer, {weight: s}, every=4, **GIVEN["pull"])
        run(optimizer, weight, 6)
        if resumes:
            state = copy.deepcopy(protection.state_dict())
            protection.remove()
            protect(optimizer, {weight: s}, every=4, **GIVEN["pull"]).load_state_dict(state)
        run(optimizer, weight, 2, first=6)
        ends.append(weight.detach())
    assert torch.equal(*ends)


def test_a_new_domain_begins_a_new_count():
    weight, s = parameter(), subspace()
    optimizer = ElasticAdamW(
        [weight], lr=1e-2, memory={weight: s}, every=2, **given("pull", s, weight), second_moment="entry"
    )
    run(optimizer, weight, 1)
    optimizer.set_memory({weight: subspace(seed=3)})
    start = weight.detach().double().clone()
    run(optimizer, weight, 1, first=1)
    change = drift(weight.detach(), start, subspace(seed=3))
    run(optimizer, weight, 1, first=2)
    assert change > 0
    assert optimizer.old_output_drift()["number 0 of group 0"] < change


class Largest(TorchDispatchMode):
    """The most entries that a tensor has which an op makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.entries = max([self.entries, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("every", [1, 2])
def test_it_keeps_r_numbers_for_each_input_and_output_and_makes_nothing_of_n_by_n(every):
    m, n, r = 16, 512, 8
    weight, s = parameter(torch.float32, m, n), subspace(n=n, r=r)
    optimizer = ElasticAdamW([weight], memory={weight: s}, every=every, **GIVEN["budget"])
    plain = SparseMaskedAdamW([other := parameter(torch.float32, m, n)])
    seen = Largest()
    for step in range(4):
        for each, w in ((optimizer, weight), (plain, other)):
            w.grad = gradient(step, m, n).float()
            with seen:
                each.step()
    kept = optimizer.state_bytes() - plain.state_bytes() + s.basis.nbytes + s.values.nbytes
    assert kept <= 4 * r * (m + n) + 4 * r + 8
    assert m * n < seen.entries <= 2 * 4 * m * n + 1024  # bytes of the moments


def test_what_does_not_go_together():
    weight, s = parameter(), subspace()
    mask = ElementMask(torch.rand(M, N) < 0.5)
    for options, message in (
        ({"every": 0}, "every: expected at least 1, got 0"),
        ({"every": 2, "capturable": True}, "every: expected 1 where capturable is set"),
        (
            {"every": 2, "masks": {weight: mask}},
            "has a ElementMask, within which every step is corrected; take every=1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ElasticAdamW([weight], memory={weight: s}, **GIVEN["pull"], **options)


def test_projections_of_the_caller_s_correct_every_step():
    ours, theirs, s = parameter(), parameter(), subspace()
    later = ElasticAdamW([ours], lr=1e-2, every=3, rest="train", **GIVEN["pull"])
    later.set_projections({ours: LowRankPull(s, s.values)})
    run(later, ours, 4)
    once = ElasticAdamW([theirs], lr=1e-2, memory={theirs: s}, **given("pull", s, theirs))
    run(once, theirs, 4)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
