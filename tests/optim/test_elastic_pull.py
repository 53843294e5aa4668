"""AdamW in turned coordinates with a proximal pull to an anchor, against both written out in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.masks import RowMask
from sparse_cl.optim import SparseMaskedAdamW
from sparse_cl.optim.elastic_pull import ElasticPull
from sparse_cl.optim.projected_adamw import ProjectedAdamW

M, N = 7, 5


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def basis(n, seed=0):
    return torch.linalg.qr(random(n, n, seed=seed)).Q


def strengths(n, seed=0, most=500.0):
    return most * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(weight, gradients, turn, columns, rows, *, lr, decay, betas=(0.9, 0.999), eps=1e-8):
    """AdamW on Z = W Q, then the minimum over Z' of ½‖Z' - Z‖² + lr ½ Σ (r + c)(Z' - Z₀)²; float64 throughout."""
    z = weight.double() @ turn
    anchor, first, second = z.clone(), 0.0, 0.0
    kappa = rows[:, None] + columns
    for t, gradient in enumerate(gradients, 1):
        g = gradient.double() @ turn
        first = betas[0] * first + (1 - betas[0]) * g
        second = betas[1] * second + (1 - betas[1]) * g * g
        z = z - lr * ((first / (1 - betas[0] ** t)) / ((second / (1 - betas[1] ** t)).sqrt() + eps) + decay * z)
        z = (z + lr * kappa * anchor) / (1 + lr * kappa)
    return z @ turn.mT


def stepped(optimizer, params, gradients):
    for gradient in gradients:
        for p in params:
            p.grad = gradient.to(p.dtype).clone()
        optimizer.step()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)]
)
@pytest.mark.parametrize("rowwise", [False, True])
def test_each_step_is_adamw_and_the_proximal_step(dtype, tolerance, rowwise):
    turn, columns = basis(N), strengths(N)
    rows = strengths(M, 1) if rowwise else None
    weight = torch.nn.Parameter(random(M, N, seed=2, dtype=dtype))
    gradients = [random(M, N, seed=10 + i, dtype=dtype) for i in range(6)]
    expected = by_hand(
        weight.detach(), gradients, turn, columns, torch.zeros(M) if rows is None else rows, lr=1e-2, decay=0.1
    )
    pull = ElasticPull(weight, turn, columns, rows)
    optimizer = ProjectedAdamW([weight], lr=1e-2, weight_decay=0.1, projections={weight: pull})
    stepped(optimizer, [weight], gradients)
    ours = optimizer.state[weight]["master"] if dtype == torch.bfloat16 else weight.detach()
    assert (ours.double() - expected).abs().max() <= tolerance * expected.abs().max()
    if dtype == torch.bfloat16:
        assert torch.equal(weight.detach(), ours.to(dtype))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.floats(0.1, 1e9))
def test_no_direction_goes_farther_than_its_strength_allows(m, n, seed, most):
    """AdamW's steps are at most lr / sqrt(1 - β₂) long, so with the decay off |D| <= that / (lr κ)."""
    turn, columns, lr = basis(n, seed), strengths(n, seed, most), 1e-2
    weight = torch.nn.Parameter(random(m, n, seed=seed))
    before = weight.detach().clone()
    pull = ElasticPull(weight, turn, columns)
    optimizer = ProjectedAdamW([weight], lr=lr, weight_decay=0.0, projections={weight: pull})
    stepped(optimizer, [weight], [random(m, n, seed=seed)] * 12)
    moved = ((weight.detach() - before) @ turn).abs()
    bound = (1 - 0.999) ** -0.5 / columns.clamp(min=1e-30)
    assert bool((moved <= bound * (1 + 1e-6) + 1e-12).all())
    assert moved.max() > 0


def test_a_pull_that_is_endless_freezes_and_one_that_is_nothing_is_adamw():
    ours, plain = (torch.nn.Parameter(random(M, N)) for _ in range(2))
    columns = torch.tensor([0.0, 0.0, 0.0, 1e30, 1e30], dtype=torch.float64)
    gradients = [random(M, N, seed=i) for i in range(5)]
    pull = ElasticPull(ours, None, columns)
    stepped(ProjectedAdamW([ours], lr=1e-2, projections={ours: pull}), [ours], gradients)
    stepped(SparseMaskedAdamW([plain], lr=1e-2), [plain], gradients)
    torch.testing.assert_close(ours[:, :3], plain[:, :3], rtol=0, atol=1e-15)
    torch.testing.assert_close(ours[:, 3:], random(M, N)[:, 3:], rtol=0, atol=1e-15)
    params = [torch.nn.Parameter(random(M, N, dtype=torch.float32)) for _ in range(2)]
    nothing = ElasticPull(params[0], basis(N), torch.zeros(N))
    stepped(ProjectedAdamW([params[0]], projections={params[0]: nothing}), params[:1], gradients)
    stepped(SparseMaskedAdamW([params[1]]), params[1:], gradients)
    assert torch.equal(*params)


def test_the_learning_rate_in_force_counts():
    """A schedule weakens the pull with the step: at lr 0 nothing moves."""
    weight = torch.nn.Parameter(random(M, N))
    optimizer = ProjectedAdamW([weight], lr=1e-2, projections={weight: ElasticPull(weight, basis(N), strengths(N))})
    stepped(optimizer, [weight], [random(M, N)])
    before = weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    stepped(optimizer, [weight], [random(M, N, seed=1)])
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=1e-14)


def test_a_vector_is_pulled_by_entry():
    weight, columns = torch.nn.Parameter(random(N)), strengths(N)
    gradients = [random(N, seed=3 + i) for i in range(4)]
    anchor = weight.detach().clone()
    expected = by_hand(anchor[None], [g[None] for g in gradients], torch.eye(N).double(), columns, torch.zeros(1),
                       lr=1e-2, decay=0.01)  # fmt: skip
    pull = ElasticPull(weight, None, columns)
    stepped(ProjectedAdamW([weight], lr=1e-2, projections={weight: pull}), [weight], gradients)
    torch.testing.assert_close(weight.detach(), expected[0], rtol=1e-12, atol=0)


@pytest.fixture
def products():
    """Sets the precision of float32 products, for the test alone."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_products_in_low_precision_change_little_of_the_way(products):
    """What the caller allows is used: bfloat16 where the CPU multiplies it. Weights far larger than their changes."""
    m, n, steps, ways = 64, 96, 30, []
    gradients = [random(m, n, seed=10 + i) for i in range(steps)]
    weight = 100 * random(m, n, seed=2)
    expected = by_hand(weight, gradients, basis(n), strengths(n, most=50.0), torch.zeros(m), lr=1e-2, decay=0.1)
    for precision in ("highest", "medium"):
        products(precision)
        ours = torch.nn.Parameter(weight.float())
        pull = ElasticPull(ours, basis(n), strengths(n, most=50.0))
        stepped(ProjectedAdamW([ours], lr=1e-2, weight_decay=0.1, projections={ours: pull}), [ours], gradients)
        ways.append(ours.detach().double() - weight)
    way = expected - weight
    assert (ways[0] - way).norm() <= 1e-4 * way.norm()
    assert (ways[1] - way).norm() <= 2e-2 * way.norm()


def test_what_is_not_finite_in_a_scaled_gradient_changes_nothing():
    weight = torch.nn.Parameter(random(M, N, dtype=torch.float32))
    pull = ElasticPull(weight, basis(N), strengths(N))
    optimizer = ProjectedAdamW([weight], lr=1e-2, projections={weight: pull})
    stepped(optimizer, [weight], [random(M, N)])
    before, moments = weight.detach().clone(), copy.deepcopy(optimizer.state[weight])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    stepped(optimizer, [weight], [torch.full((M, N), torch.nan)])
    assert torch.equal(weight.detach(), before)
    assert all(torch.equal(moments[name], value) for name, value in optimizer.state[weight].items())


def test_a_resumed_optimizer_goes_on_alike():
    weights = [torch.nn.Parameter(random(M, N, dtype=torch.float32)) for _ in range(2)]
    first, second = (
        ProjectedAdamW([w], lr=1e-2, projections={w: ElasticPull(w, basis(N), strengths(N))}) for w in weights
    )
    stepped(first, weights[:1], [random(M, N, seed=i) for i in range(3)])
    weights[1].data.copy_(weights[0].data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer, weight in zip((first, second), weights, strict=True):
        stepped(optimizer, [weight], [random(M, N, seed=9)])
    assert torch.equal(*weights)


def test_what_does_not_fit():
    anchor = torch.zeros(M, N)
    with pytest.raises(ValueError, match=r"columns: expected \(5,\) strengths of at least 0 .* the least of them -1"):
        ElasticPull(anchor, None, torch.tensor([1.0, -1, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"rows: expected \(7,\) strengths .*, got \(5,\)"):
        ElasticPull(anchor, None, None, torch.ones(N))
    with pytest.raises(ValueError, match="rows: expected none for an anchor of shape"):
        ElasticPull(torch.zeros(N), None, None, torch.ones(N))
    with pytest.raises(ValueError, match=r"basis: expected \(5, 5\), got \(4, 4\)"):
        ElasticPull(anchor, basis(4), torch.ones(N))
    weight = torch.nn.Parameter(random(M, N, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"has shape \(7, 5\), but its projection is for \(7, 4\)"):
        ProjectedAdamW([("w", weight)], projections={"w": ElasticPull(torch.zeros(M, 4), basis(4), torch.ones(4))})
    with pytest.raises(ValueError, match="bfloat16 without a master"):
        pull = ElasticPull(weight, basis(N), torch.ones(N))
        ProjectedAdamW([("w", weight)], projections={"w": pull}, master_weights=False)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["turned", "pull_", "apply_"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_breaks_off_leaves_the_weights(monkeypatch, where, error, dtype):
    weight = torch.nn.Parameter(random(M, N, dtype=dtype))
    pull = ElasticPull(weight, basis(N), strengths(N))
    optimizer = ProjectedAdamW([weight], lr=1e-2, weight_decay=0.1, projections={weight: pull})
    stepped(optimizer, [weight], [random(M, N, seed=1)] * 3)
    before = weight.detach().clone()
    master = optimizer.state[weight]["master"].clone() if dtype == torch.bfloat16 else None

    def broken(*arguments):
        raise error("cut short")

    with monkeypatch.context() as patch, pytest.raises(error, match="cut short"):
        patch.setattr(pull, where, broken)
        stepped(optimizer, [weight], [random(M, N, seed=2)])
    assert torch.equal(weight.detach(), before)
    if master is not None:
        assert torch.equal(optimizer.state[weight]["master"], master)
    stepped(optimizer, [weight], [random(M, N, seed=3)])
    assert 0 < (weight.detach() - before).abs().max() < 0.1


def test_masks_are_refused_later_too():
    weight = torch.nn.Parameter(random(M, N))
    optimizer = ProjectedAdamW([weight], projections={weight: ElasticPull(weight, basis(N), strengths(N))})
    with pytest.raises(ValueError, match="masks: parameter .* has a RowMask, but what a mask leaves of an update"):
        optimizer.set_masks({weight: RowMask([0], (M, N))})
    optimizer.set_masks({})
