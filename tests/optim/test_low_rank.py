"""The three rules, fused into the step: against AdamW and the nearest weights written out in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from cases.rules import (
    RULES,
    M,
    N,
    Oracle,
    R,
    basis,
    drift,
    energies,
    follow,
    gradient,
    parameter,
    random,
    rms,
    run,
    stepped,
    subspace,
)

from sparse_cl import (
    ColumnMask,
    DriftBudget,
    ElasticAdamW,
    LowRankPull,
    ProjectedAdamW,
    RowMask,
    SparseMaskedAdamW,
    Subspace,
    SubspaceProjectedAdamW,
    SubspaceProjection,
    ops,
)

KEY = "projection.moved"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-5}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rate", ["float", "tensor"])
def test_fifty_steps_of_a_schedule(rule, dtype, rate):
    s = subspace(torch.float64 if dtype == torch.float64 else torch.float32)
    weight = parameter(dtype)
    oracle = Oracle(rule, weight, s)
    lr = torch.tensor(1e-2, dtype=torch.float64) if rate == "tensor" else 1e-2
    optimizer = ProjectedAdamW([weight], lr=lr, weight_decay=0.1, projections={weight: RULES[rule](s)})
    follow(optimizer, oracle, weight)
    ours = stepped(optimizer, weight)
    assert (ours - oracle.w).abs().max() <= TOLERANCE[dtype] * oracle.w.abs().max()
    if dtype == torch.bfloat16:
        assert torch.equal(weight.detach(), ours.to(dtype))
    change = ours - oracle.start
    if rule == "hard":
        assert (change @ basis()).square().sum() <= 1e-6 * change.square().sum()
        assert KEY not in optimizer.state[weight]
    else:
        moved, expected = optimizer.state[weight][KEY].double(), change @ s.basis.double()
        assert expected.norm() > 0.03
        assert (moved - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [False, True])
def test_a_budget_holds_at_every_step(dtype, columns):
    weight, s = parameter(dtype), subspace()
    mask = {"masks": {weight: ColumnMask(range(4, 28), (M, N))}} if columns else {}
    optimizer = ElasticAdamW([weight], lr=3e-2, weight_decay=0.1, memory={weight: s}, budget=1e-4, **mask)
    start, spent = weight.detach().double().clone(), []

    def look(step):
        kept = optimizer.state[weight].get("master")
        now = start.clone()
        if kept is None:
            now = weight.detach().double()
        elif columns:
            now[:, 4:28] = kept.double()
        else:
            now = kept.double()
        spent.append(drift(now, start, s))
        assert optimizer.old_output_drift()["number 0 of group 0"] == pytest.approx(spent[-1], rel=1e-3)

    run(optimizer, weight, 30, each=look)
    assert max(spent) <= 1e-4 * (1 + 1e-5)
    assert spent[-1] > 0.9e-4


def test_five_hundred_steps_leave_p_what_it_says():
    weight, s = parameter(), subspace()
    start = weight.detach().double().clone()
    optimizer = ElasticAdamW([weight], lr=1e-2, memory={weight: s}, strength=0.3)
    run(optimizer, weight, 500)
    expected = (weight.detach().double() - start) @ s.basis.double()
    assert (optimizer.state[weight][KEY].double() - expected).norm() <= 1e-4 * expected.norm()


def test_the_account_is_the_change_of_outputs_on_the_data():
    """E‖(W - W₀)x‖² of inputs that lie in the directions, exactly; with others, what τ allows."""
    inputs = random(2000, R, seed=3) * energies().sqrt() @ basis().mT
    moment = inputs.mT @ inputs / len(inputs)
    values, vectors = torch.linalg.eigh(moment)
    s = Subspace(vectors[:, -R:].float(), values[-R:].float())
    weight = parameter()
    start = weight.detach().double().clone()
    optimizer = ElasticAdamW([weight], lr=1e-2, memory={weight: s}, strength=5.0)
    run(optimizer, weight, 20)
    change = weight.detach().double() - start
    said = optimizer.old_output_drift()["number 0 of group 0"]
    held = (inputs @ start.mT).square().sum()
    assert said == pytest.approx(float((inputs @ change.mT).square().sum() / held), rel=1e-4)
    more = inputs + 0.1 * random(2000, N, seed=4)
    outside = 0.01 * N
    seen = float((more @ change.mT).square().sum(1).mean())
    held = float((inputs @ start.mT).square().sum(1).mean())
    assert seen <= (said * held) * 1.05 + outside * float(torch.linalg.matrix_norm(change, 2)) ** 2


@pytest.mark.parametrize("rule", RULES)
def test_a_transposed_weight_is_stepped_as_its_transpose(rule):
    s = subspace()
    weight, turned = parameter(), torch.nn.Parameter(parameter().detach().mT.contiguous())
    ours = ProjectedAdamW([weight], lr=1e-2, projections={weight: RULES[rule](s)})
    given = RULES[rule](s)
    given.transposed = True
    theirs = ProjectedAdamW([turned], lr=1e-2, projections={turned: given})
    for step in range(10):
        weight.grad = gradient(step).float()
        turned.grad = weight.grad.mT.contiguous()
        ours.step()
        theirs.step()
    torch.testing.assert_close(weight.detach(), turned.detach().mT, rtol=0, atol=2e-6)


def test_an_adapter_is_pulled_to_zero():
    s = subspace()
    a = torch.nn.Parameter(random(4, N, dtype=torch.float32))
    optimizer = ProjectedAdamW([a], lr=1e-2, projections={a: LowRankPull(s, 1e4 * s.values, from_zero=True)})
    a.grad = random(4, N, seed=1).float()
    for _ in range(5):
        optimizer.step()
    assert (a.detach() @ s.basis).norm() <= 1e-2 * a.detach().norm()
    torch.testing.assert_close(optimizer.state[a][KEY], a.detach() @ s.basis, rtol=0, atol=1e-5)


def test_the_pull_holds_back_what_adamw_alone_would_do():
    ends = []
    for most in (0.0, 1e2, 1e30):
        weight = parameter()
        before = weight.detach().clone()
        projection = LowRankPull(basis().float(), torch.full((R,), most))
        run(ProjectedAdamW([weight], lr=1e-2, projections={weight: projection}), weight, 30)
        ends.append(float(((weight.detach() - before) @ basis().float()).norm()))
    assert ends[0] > 3 * ends[1]
    assert ends[2] <= 1e-4 * ends[0]


def test_no_strength_is_plain_adamw():
    ours, plain = parameter(), parameter()
    first = ProjectedAdamW([ours], projections={ours: LowRankPull(basis().float(), torch.zeros(R))})
    run(first, ours, 3)
    run(SparseMaskedAdamW([plain]), plain, 3)
    assert torch.equal(ours, plain)
    assert KEY not in first.state[ours]


@pytest.mark.parametrize("rule", RULES)
def test_a_skipped_step_changes_nothing(rule):
    weight = parameter()
    optimizer = ProjectedAdamW([weight], lr=1e-2, projections={weight: RULES[rule](subspace())})
    run(optimizer, weight, 1)
    before, state = weight.detach().clone(), copy.deepcopy(dict(optimizer.state[weight]))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor([1.0])
    weight.grad = torch.full((M, N), torch.nan)
    optimizer.step()
    assert torch.equal(weight.detach(), before)
    assert all(torch.equal(state[name], value) for name, value in optimizer.state[weight].items())
    optimizer.found_inf = torch.tensor([0.0])
    run(optimizer, weight, 1, first=1)
    assert not torch.equal(weight.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["pull", "budget"])
def test_a_checkpoint_goes_on_with_the_same_bits(rule, dtype, tmp_path):
    first, s = parameter(dtype), subspace()
    optimizer = ProjectedAdamW([("w", first)], lr=1e-2, projections={"w": RULES[rule](s)})
    run(optimizer, first, 3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    second = torch.nn.Parameter(first.detach().clone())
    resumed = ProjectedAdamW([("w", second)], lr=1e-2, projections={"w": RULES[rule](s)})
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(resumed.state[second][KEY], optimizer.state[first][KEY])
    assert resumed.state[second][KEY].dtype == torch.float32
    copied = copy.deepcopy(resumed)
    (third,) = copied.param_groups[0]["params"]
    for each, weight in ((optimizer, first), (resumed, second), (copied, third)):
        run(each, weight, 3, first=3)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert optimizer.state[first][KEY].any()
    assert torch.equal(optimizer.state[first][KEY], copied.state[third][KEY])


def test_a_new_projection_begins_where_the_weight_is():
    weight = parameter()
    optimizer = ProjectedAdamW([weight], lr=1e-2, projections={weight: RULES["pull"](subspace())})
    run(optimizer, weight, 1)
    optimizer.set_projections(optimizer.projections)
    assert optimizer.state[weight][KEY].any()
    optimizer.set_projections({weight: RULES["pull"](subspace(seed=3, r=4))})
    assert KEY not in optimizer.state[weight]
    before = weight.detach().clone()
    optimizer.step()
    expected = (weight.detach() - before) @ basis(seed=3, r=4).float()
    torch.testing.assert_close(optimizer.state[weight][KEY], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("broken", ["masked_adamw_", "apply_updates_"])
def test_a_step_that_breaks_off_leaves_the_weights_and_where_they_are(monkeypatch, broken):
    weight = parameter()
    optimizer = ProjectedAdamW([weight], lr=1e-2, projections={weight: RULES["pull"](subspace())})
    run(optimizer, weight, 1)
    before, moved = weight.detach().clone(), optimizer.state[weight][KEY].clone()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ops, broken, interrupted)
        optimizer.step()
    assert torch.equal(weight.detach(), before)
    assert torch.equal(optimizer.state[weight][KEY], moved)


@pytest.mark.parametrize("masked", [False, True])
def test_a_strength_is_relative_to_the_size_of_the_weights_and_stays_with_the_domain(masked):
    weight, s = parameter(), subspace()
    start, masks = weight.detach().double().clone(), {weight: RowMask(range(0, M, 2), (M, N))}
    optimizer = ElasticAdamW(
        [weight], lr=1e-2, weight_decay=0.0, memory={weight: s}, strength=3.0, second_moment="entry"
    )
    oracle = Oracle("pull", weight, Subspace(s.basis, s.usage * 3 / rms(weight)), decay=0.0)
    for step in range(10):
        oracle.step(gradient(step), 1e-2)
        weight.grad = gradient(step).float()
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), oracle.w, rtol=0, atol=2e-5)
    if masked:
        optimizer.set_masks(masks)
    state = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        weight.mul_(3)
    again = ElasticAdamW(
        [weight], lr=1e-2, memory={weight: s}, strength=3.0, masks=masks if masked else None, second_moment="entry"
    )
    again.load_state_dict(state)
    assert float(again.state[weight]["projection.scale"]) == pytest.approx(rms(start), rel=1e-9)


def test_what_does_not_fit():
    u, s = basis().float(), subspace()
    with pytest.raises(ValueError, match="basis: its columns are not orthonormal"):
        LowRankPull(2 * u, torch.ones(R))
    for wrong in (torch.ones(R + 1), -torch.ones(R), torch.full((R,), torch.inf)):
        with pytest.raises(ValueError, match=r"strengths: expected \(5,\) finite numbers of at least 0, one for each"):
            LowRankPull(u, wrong)
    with pytest.raises(TypeError, match="basis: expected a float32 or float64 tensor"):
        LowRankPull(u.bfloat16(), torch.ones(R))
    with pytest.raises(ValueError, match="budget: expected a share above 0, got 0; for none at all take Subspace"):
        DriftBudget(s, 0)
    weight = parameter(torch.float32, M, N + 1)
    with pytest.raises(ValueError, match=r"'w' has shape \(24, 33\), but its basis has width 32; expected \(n, r\)"):
        ProjectedAdamW([("w", weight)], projections={"w": LowRankPull(u, torch.ones(R))})
    weight = parameter()
    for given, message in (
        ({"row_strength": -1.0}, "row_strength: expected a number of at least 0, got -1"),
        ({"strength": -1.0}, "strength: expected a number of at least 0, got -1"),
        ({"budget": -1.0}, "budget: expected a share of at least 0, got -1"),
        ({"budget": 1.0, "strength": 1.0}, "budget: expected no strength beside it"),
    ):
        with pytest.raises(ValueError, match=message):
            ElasticAdamW([weight], memory={weight: s}, **given)


def test_a_budget_of_nothing_is_the_hard_rule():
    ours, theirs, s = parameter(), parameter(), subspace()
    run(ElasticAdamW([ours], lr=1e-2, memory={ours: s}, budget=0.0, second_moment="entry"), ours, 3)
    run(SubspaceProjectedAdamW([theirs], lr=1e-2, memory={theirs: s}), theirs, 3)
    assert torch.equal(ours, theirs)
    assert isinstance(SubspaceProjection(s).rule, type(SubspaceProjection(basis().float()).rule))


def test_a_state_of_another_rank_is_refused():
    first, second = parameter(), parameter()
    optimizer = ProjectedAdamW([("w", first)], projections={"w": RULES["pull"](subspace())})
    run(optimizer, first, 1)
    second.grad = first.grad
    other = ProjectedAdamW([("w", second)], projections={"w": RULES["pull"](subspace(r=4))})
    other.load_state_dict(optimizer.state_dict())
    before = second.detach().clone()
    with pytest.raises(ValueError, match=r"state of parameter 'w': projection.moved: expected .*\(24, 4\), got \(24"):
        other.step()
    assert torch.equal(second.detach(), before)


@pytest.mark.parametrize("given", [{"strength": 5.0}, {"budget": 1e-3}])
def test_a_memory_that_is_set_begins_where_the_weights_are_whatever_a_state_kept(given):
    weight, ends = parameter(), []
    first = ElasticAdamW([weight], lr=1e-2, memory={weight: subspace()}, **given)
    run(first, weight, 20)
    for follows in (True, False):
        own = torch.nn.Parameter(weight.detach().clone())
        optimizer = ElasticAdamW([own], lr=1e-2, **given)
        if follows:
            optimizer.set_memory({own: subspace()})
        optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
        optimizer.set_memory({own: subspace(seed=3)})
        run(optimizer, own, 20)
        ends.append(own.detach())
    assert torch.equal(*ends)
    assert drift(ends[0], weight.detach().double(), subspace(seed=3)) <= given.get("budget", 1) * 1.001


@pytest.mark.parametrize("rule", ["pull", "budget"])
def test_a_state_that_was_emptied_within_a_domain_is_refused(rule):
    weight, projection = parameter(torch.float64), RULES[rule](subspace(torch.float64))
    optimizer = ProjectedAdamW([weight], lr=1e-2, projections={weight: projection})
    run(optimizer, weight, 3)
    optimizer.state.clear()
    before = weight.detach().clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="number 0 of group 0: it was emptied within a domain.*projections anew"):
            optimizer.step()
    assert torch.equal(weight, before)
    assert not optimizer.state

    optimizer.set_projections({weight: RULES[rule](subspace(torch.float64))})
    optimizer.step()
    kept = optimizer.state[weight]
    torch.testing.assert_close(kept[KEY], (weight - before).detach() @ projection.subspace.basis)
    assert kept["step"].item() == 1
