"""AdamW in turned coordinates, damped direction by direction, against a plain float64 AdamW of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.optim import SparseMaskedAdamW
from sparse_cl.optim.damping import Damping
from sparse_cl.optim.projected_adamw import ProjectedAdamW

M, N = 7, 5


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def basis(n, seed=0):
    return torch.linalg.qr(random(n, n, seed=seed)).Q


def gains(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(weight, gradients, turn, columns, rows, *, lr, decay, betas=(0.9, 0.999), eps=1e-8):
    """W after ΔW = diag(r) AdamW(G Q) diag(c) Qᵀ, the decay in the same coordinates; float64 throughout."""
    weight, first, second = weight.double().clone(), 0.0, 0.0
    for t, gradient in enumerate(gradients, 1):
        g = gradient.double() @ turn
        first = betas[0] * first + (1 - betas[0]) * g
        second = betas[1] * second + (1 - betas[1]) * g * g
        step = (first / (1 - betas[0] ** t)) / ((second / (1 - betas[1] ** t)).sqrt() + eps)
        change = -lr * (step + decay * (weight @ turn))
        weight += (rows[:, None] * change * columns) @ turn.mT
    return weight


def stepped(optimizer, params, gradients):
    for gradient in gradients:
        for p in params:
            p.grad = gradient.to(p.dtype).clone()
        optimizer.step()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)]
)
@pytest.mark.parametrize("rowwise", [False, True])
def test_each_update_is_the_formula(dtype, tolerance, rowwise):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    turn, columns = basis(N).to(wide), gains(N).to(wide)
    rows = gains(M, 1).to(wide) if rowwise else None
    weight = torch.nn.Parameter(random(M, N, seed=2, dtype=dtype))
    gradients = [random(M, N, seed=10 + i, dtype=dtype) for i in range(6)]
    expected = by_hand(
        weight.detach(),
        gradients,
        turn.double(),
        columns.double(),
        torch.ones(M).double() if rows is None else rows.double(),
        lr=1e-2,
        decay=0.1,
    )
    optimizer = ProjectedAdamW([weight], lr=1e-2, weight_decay=0.1, projections={weight: Damping(turn, columns, rows)})
    stepped(optimizer, [weight], gradients)
    ours = optimizer.state[weight]["master"] if dtype == torch.bfloat16 else weight.detach()
    assert (ours.double() - expected).abs().max() <= tolerance * expected.abs().max()
    if dtype == torch.bfloat16:
        assert torch.equal(weight.detach(), ours.to(dtype))


@given(st.integers(1, 9), st.integers(2, 9), st.integers(0, 99))
def test_a_direction_without_gain_is_never_entered(m, n, seed):
    turn, columns = basis(n, seed), gains(n, seed)
    columns[seed % n] = 0
    weight = torch.nn.Parameter(random(m, n, seed=seed))
    before = weight.detach().clone()
    optimizer = ProjectedAdamW([weight], lr=1e-2, projections={weight: Damping(turn, columns)})
    stepped(optimizer, [weight], [random(m, n, seed=seed + i) for i in range(3)])
    change = (weight.detach() - before) @ turn
    assert change[:, seed % n].abs().max() <= 1e-13
    assert change.abs().max() > 1e-6


def test_rows_without_gain_stay_bit_identical():
    rows = gains(M)
    rows[[1, 4]] = 0
    weight = torch.nn.Parameter(random(M, N, dtype=torch.float32))
    before = weight.detach().clone()
    optimizer = ProjectedAdamW([weight], lr=1e-2, projections={weight: Damping(None, None, rows.float())})
    stepped(optimizer, [weight], [random(M, N, seed=i, dtype=torch.float32) for i in range(3)])
    same = (weight.detach() == before).all(1)
    assert same.nonzero().flatten().tolist() == [1, 4]


def test_a_vector_is_damped_by_entry():
    columns = torch.full((N,), 0.25, dtype=torch.float64)
    ours, plain = (torch.nn.Parameter(random(N)) for _ in range(2))
    gradients = [random(N, seed=3)]
    stepped(ProjectedAdamW([ours], lr=1e-2, projections={ours: Damping(None, columns)}), [ours], gradients)
    stepped(SparseMaskedAdamW([plain], lr=1e-2), [plain], gradients)
    torch.testing.assert_close(ours - random(N), 0.25 * (plain - random(N)), rtol=1e-9, atol=0)


def test_nothing_damped_is_plain_adamw():
    params = [torch.nn.Parameter(random(M, N, dtype=torch.float32)) for _ in range(2)]
    gradients = [random(M, N, seed=i) for i in range(4)]
    free = Damping(basis(N).float(), torch.ones(N))
    stepped(ProjectedAdamW([params[0]], projections={params[0]: free}), params[:1], gradients)
    stepped(SparseMaskedAdamW([params[1]]), params[1:], gradients)
    assert torch.equal(*params)


def test_the_share_that_is_kept():
    turn, columns, rows, matrix = basis(N), gains(N), gains(M, 1), random(M, N)
    energies = (matrix @ turn).square()
    expected = float((rows[:, None] * energies * columns).sum() / energies.sum())
    assert Damping(turn, columns, rows).share_kept(matrix) == pytest.approx(expected, rel=1e-12)
    assert Damping(turn, columns, rows).share_kept(torch.zeros(M, N)) == 1.0


def test_what_is_not_finite_in_a_scaled_gradient_changes_nothing():
    weight = torch.nn.Parameter(random(M, N, dtype=torch.float32))
    optimizer = ProjectedAdamW([weight], lr=1e-2, projections={weight: Damping(basis(N).float(), gains(N).float())})
    stepped(optimizer, [weight], [random(M, N)])
    before, moments = weight.detach().clone(), copy.deepcopy(optimizer.state[weight])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    stepped(optimizer, [weight], [torch.full((M, N), torch.nan)])
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=0)
    assert all(torch.equal(moments[name], value) for name, value in optimizer.state[weight].items())


def test_a_resumed_optimizer_goes_on_alike():
    turn, columns = basis(N).float(), gains(N).float()
    weights = [torch.nn.Parameter(random(M, N, dtype=torch.float32)) for _ in range(2)]
    first, second = (ProjectedAdamW([w], lr=1e-2, projections={w: Damping(turn, columns)}) for w in weights)
    stepped(first, weights[:1], [random(M, N, seed=i) for i in range(3)])
    weights[1].data.copy_(weights[0].data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer, weight in zip((first, second), weights, strict=True):
        stepped(optimizer, [weight], [random(M, N, seed=9)])
    assert torch.equal(*weights)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"columns: expected a vector of gains in \[0, 1\]"):
        Damping(None, torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="columns: expected the gain of each direction"):
        Damping(basis(3), None)
    with pytest.raises(ValueError, match=r"basis: expected \(3, 3\) for as many gains, got \(4, 4\)"):
        Damping(basis(4), gains(3))
    weight = torch.nn.Parameter(random(M, N, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"has shape \(7, 5\), but its projection is for \(any, 4\)"):
        ProjectedAdamW([("w", weight)], projections={"w": Damping(basis(4), gains(4))})
    with pytest.raises(ValueError, match="bfloat16 without a master"):
        ProjectedAdamW(
            [("w", weight)], projections={"w": Damping(basis(N).float(), gains(N).float())}, master_weights=False
        )
