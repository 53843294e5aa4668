"""The three rules under masks: what the mask leaves to see, exactly, and nothing outside it."""

from __future__ import annotations

import pytest
import torch
from cases.rules import RULES, M, N, R, drift, gradient, parameter, run, subspace

from sparse_cl import (
    ColumnMask,
    DriftBudget,
    ElasticAdamW,
    ElementMask,
    LowRankPull,
    ProjectedAdamW,
    RowMask,
    TwoFourMask,
)
from sparse_cl.nn import ActiveLinear

KEY = "projection.moved"


@pytest.mark.parametrize("rule", RULES)
def test_a_row_mask_is_the_rule_of_its_rows(rule):
    rows = [1, 4, 7, 8]
    masked, dense = parameter(), torch.nn.Parameter(parameter().detach()[rows].clone())
    s = subspace()
    projection = RULES[rule](s)
    if rule == "budget":  # of the whole weight's outputs, which the rows alone hold less of
        held = [(w.detach().double() @ s.basis.double()).square().sum(0) @ s.values.double() for w in (masked, dense)]
        projection = DriftBudget(s, 1e-3 * float(held[1] / held[0]))
    ours = ProjectedAdamW([masked], lr=1e-2, projections={masked: projection}, masks={masked: RowMask(rows, (M, N))})
    plain = ProjectedAdamW([dense], lr=1e-2, projections={dense: RULES[rule](s)})
    before = masked.detach().clone()
    for step in range(5):
        masked.grad = gradient(step).float()
        dense.grad = masked.grad[rows]
        ours.step()
        plain.step()
    torch.testing.assert_close(masked.detach()[rows], dense.detach(), rtol=0, atol=2e-6)
    others = [i for i in range(M) if i not in rows]
    assert torch.equal(masked.detach()[others], before[others])


@pytest.mark.parametrize("rule", ["hard", "pull"])
def test_a_column_mask_is_the_rule_of_what_its_columns_see(rule):
    """The proximal step on the mask's entries alone, solved entry by entry."""
    columns, s = list(range(3, 20)), subspace()
    weight = parameter()
    start = weight.detach().double().clone()
    optimizer = ProjectedAdamW(
        [weight], lr=1e-2, projections={weight: RULES[rule](s)}, masks={weight: ColumnMask(columns, (M, N))}
    )
    plain = torch.nn.Parameter(start[:, columns].clone())
    adam = torch.optim.AdamW([plain], lr=1e-2)
    u = s.basis.double()[columns]
    weight.grad = gradient(0).float()
    plain.grad = weight.grad.double()[:, columns]
    optimizer.step()
    adam.step()
    moved = plain.detach() - start[:, columns]
    if rule == "pull":
        system = torch.eye(len(columns), dtype=torch.float64) + 1e-2 * (u * s.values.double()) @ u.mT
        expected = torch.linalg.solve(system, moved.mT).mT
    else:
        expected = moved - moved @ u @ torch.linalg.pinv(u)
    torch.testing.assert_close(weight.detach().double()[:, columns] - start[:, columns], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_budget_holds_when_the_rows_change(dtype):
    """What rows that were left have moved still counts."""
    weight, s = parameter(dtype), subspace()
    start, spent = weight.detach().double().clone(), []
    exact = start.clone()
    optimizer = ElasticAdamW([weight], lr=3e-2, memory={weight: s}, budget=1e-4)
    for rows in ([0, 1, 2, 3], [2, 3, 9, 10], [0, 20]):
        optimizer.set_masks({weight: RowMask(rows, (M, N))})
        for step in range(8):
            weight.grad = gradient(step).to(dtype)
            optimizer.step()
            master = optimizer.state[weight].get("master", weight.detach()[rows])
            exact[rows] = master.double()
            spent.append(drift(exact, start, s))
            said = optimizer.old_output_drift()["number 0 of group 0"]
            assert said == pytest.approx(spent[-1], rel=1e-2 if dtype == torch.bfloat16 else 1e-3)
    assert spent[0] > 0.5e-4
    slack = 1e-2 if dtype == torch.bfloat16 else 1e-5  # rows that were left are rounded to bfloat16
    assert max(spent) <= 1e-4 * (1 + slack)


def test_columns_that_have_moved_stay():
    weight, s = parameter(), subspace()
    masks = {weight: ColumnMask(range(8), (M, N))}
    optimizer = ElasticAdamW([weight], lr=1e-2, memory={weight: s}, budget=1e-4, masks=masks)
    optimizer.set_masks({weight: ColumnMask(range(9), (M, N))})  # nothing has moved yet
    run(optimizer, weight, 1)
    optimizer.set_masks({weight: ColumnMask(range(9), (M, N))})
    with pytest.raises(ValueError, match="has moved under its ColumnMask, .* begin a new domain by setting"):
        optimizer.set_masks(masks)
    optimizer.set_memory({weight: s})
    optimizer.set_masks(masks)
    run(optimizer, weight, 1)


@pytest.mark.parametrize("kind", ["elements", "2:4"])
@pytest.mark.parametrize("rule", ["hard", "pull"])
def test_masks_of_single_weights_keep_p_exact_and_never_push_away(kind, rule):
    dense = torch.rand(M, N, generator=torch.Generator().manual_seed(1)) < 0.5
    if kind == "2:4":
        rank = torch.rand(M, N // 4, 4, generator=torch.Generator().manual_seed(1)).argsort(-1) < 2
        dense = rank.view(M, N)
    mask = (ElementMask if kind == "elements" else TwoFourMask)(dense)
    ends, s = [], subspace()
    for projection in (RULES[rule](s), LowRankPull(s, torch.zeros(R))):
        weight = parameter()
        start = weight.detach().clone()
        optimizer = ProjectedAdamW([weight], lr=1e-2, projections={weight: projection}, masks={weight: mask})
        run(optimizer, weight, 30)
        change = (weight.detach() - start).double()
        assert not change[~dense].any()
        ends.append(float((change @ s.basis.double()).square().sum(0) @ s.values.double()))
        if projection.any:
            expected = change @ s.basis.double()
            assert (optimizer.state[weight][KEY].double() - expected).norm() <= 1e-4 * expected.norm()
    assert ends[0] < 0.5 * ends[1]
    with pytest.raises(ValueError, match=r"within which no budget can be kept; take a RowMask or ColumnMask, or a"):
        ProjectedAdamW([weight], projections={weight: RULES["budget"](s)}, masks={weight: mask})


@pytest.mark.parametrize("rule", RULES)
def test_a_leaf_of_rows_is_stepped_by_its_rows(rule):
    rows = [1, 4, 7, 8]
    leaf = ActiveLinear(N, M, bias=False, mask=RowMask(rows, (M, N)))
    masked = torch.nn.Parameter(leaf.weight.detach().clone())
    given = RULES[rule](subspace())
    ours = ProjectedAdamW([leaf.active], lr=1e-2, projections={leaf.active: given})
    plain = ProjectedAdamW([masked], lr=1e-2, projections={masked: given}, masks={masked: RowMask(rows, (M, N))})
    for step in range(5):
        masked.grad = gradient(step).float()
        leaf.active.grad = masked.grad[rows]
        ours.step()
        plain.step()
    torch.testing.assert_close(leaf.weight.detach(), masked.detach(), rtol=0, atol=1e-6)
