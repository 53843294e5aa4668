"""Curvature in Kronecker factors: the threshold of a budget, the projection, and the optimizer that applies it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.masks import RowMask
from sparse_cl.optim import SparseMaskedAdamW
from sparse_cl.optim.curvature_projection import CurvatureProjection
from sparse_cl.optim.projected_adamw import ProjectedAdamW
from sparse_cl.subspace.kronecker import Kronecker, threshold_of

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


def moment(size, seed, rows=None):
    """A second moment whose eigenvalues span a few decades, float64; singular if of fewer rows than it is wide."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows or 4 * size, size, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -2, size, dtype=torch.float64)
    return x.mT @ x / len(x)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def products(rows, columns):
    """λ_S λ_A and the two eigenbases, by the definition."""
    (s, q), (a, k) = (torch.linalg.eigh(m) for m in (rows, columns))
    return s.clamp(min=0)[:, None] * a.clamp(min=0), q, k


@given(SHAPES, SHAPES, st.floats(0.01, 0.999), st.integers(0, 99))
def test_the_fewest_products_with_the_share_lie_above_the_threshold(first, second, energy, seed):
    # Of different seeds: equal products cannot be told apart by a threshold.
    pairs = [(moment(m, seed + i), moment(n, seed + i + 1)) for i, (m, n) in enumerate((first, second))]
    curvatures = [Kronecker.of(*pair, torch.float64) for pair in pairs]
    threshold = threshold_of(curvatures, energy)
    values = torch.cat([products(*pair)[0].flatten() for pair in pairs]).sort(descending=True).values
    explained = values.cumsum(0) / values.sum()
    fewest = int((explained < energy - 1e-12).sum()) + 1
    assert sum(c.above(threshold)[1] for c in curvatures) == fewest
    assert sum(c.above(threshold)[0] for c in curvatures) == pytest.approx(float(values[:fewest].sum()), rel=1e-9)
    assert threshold == pytest.approx(float(values[fewest - 1]), rel=2e-6)


@given(SHAPES, st.floats(0.05, 0.99), st.integers(0, 99))
def test_hard_removes_what_is_above_and_keeps_within_the_budget(shape, energy, seed):
    rows, columns = moment(shape[0], seed), moment(shape[1], seed + 1)
    curvature = Kronecker.of(rows, columns, torch.float64)
    threshold = 1.0001 * threshold_of([curvature], energy)  # off the products themselves
    values, q, k = products(rows, columns)
    update = random(*shape, seed=seed)
    expected = q @ ((q.mT @ update @ k) * (values <= threshold)) @ k.mT
    projection = CurvatureProjection(curvature, threshold)
    assert projection.used() == (values > threshold).sum()
    inside = float((update - expected).square().sum() / update.square().sum())
    assert projection.share_inside(update) == pytest.approx(inside, rel=1e-9, abs=1e-12)
    projection.apply_(update)
    torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-12)
    weighted = torch.trace(rows @ update @ columns @ update.mT)
    assert weighted <= threshold * update.square().sum() * (1 + 1e-9) + 1e-20


@given(SHAPES, st.floats(0.05, 0.99), st.integers(0, 99))
def test_soft_damps_by_the_formula(shape, energy, seed):
    rows, columns = moment(shape[0], seed), moment(shape[1], seed + 1)
    curvature = Kronecker.of(rows, columns, torch.float64)
    threshold = threshold_of([curvature], energy)
    values, q, k = products(rows, columns)
    update = random(*shape, seed=seed)
    expected = q @ ((q.mT @ update @ k) * (threshold / (threshold + values))) @ k.mT
    projection = CurvatureProjection(curvature, threshold, "soft")
    assert projection.used() == pytest.approx(float((values / (threshold + values)).sum()), rel=1e-9)
    projection.apply_(update)
    torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-12)


def test_a_diagonal_stands_for_its_matrix():
    diagonal, columns, update = random(6, seed=1).abs(), moment(4, 2), random(6, 4)
    results = []
    for rows in (diagonal, torch.diag(diagonal)):
        results.append(update.clone())
        CurvatureProjection(Kronecker.of(rows, columns, torch.float64), 0.01, "soft").apply_(results[-1])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-13)
    # What is no matrix: entry i by τ/(τ + F_i).
    vector = random(6, seed=3)
    expected = vector * (0.01 / (0.01 + diagonal))
    CurvatureProjection(Kronecker.of(diagonal, torch.ones(1, 1)), 0.01, "soft").apply_(vector)
    torch.testing.assert_close(vector, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_energy_1_leaves_what_has_no_curvature(mode):
    """And no NaN where the threshold is 0."""
    rows, columns = moment(6, 1, rows=3), moment(5, 2, rows=2)
    # Exact zeros: eigenvalues of a singular matrix are rounding errors.
    curvature = Kronecker.of(rows, columns, torch.float64)
    curvature.row_values[3:], curvature.column_values[2:] = 0, 0
    assert threshold_of([curvature], 1) == 0
    projection, update = CurvatureProjection(curvature, 0.0, mode), random(6, 5)
    coordinates = curvature.row_basis.mT @ update @ curvature.column_basis
    coordinates[:3, :2] = 0
    expected = curvature.row_basis @ coordinates @ curvature.column_basis.mT
    projection.apply_(update)
    torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-12)
    assert projection.free
    assert projection.used() == 6


def stepped(optimizer, params, steps, seed=0):
    for step in range(steps):
        for number, p in enumerate(params):
            p.grad = random(*p.shape, seed=1000 * seed + 10 * step + number, dtype=p.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_leak_of_fifty_steps(dtype):
    rows, columns = moment(24, 1), moment(16, 2)
    curvature = Kronecker.of(rows, columns)
    threshold = threshold_of([curvature], 0.9)
    weight = torch.nn.Parameter(random(24, 16, seed=5, dtype=dtype))
    before = weight.detach().double()
    optimizer = ProjectedAdamW(
        [weight], lr=1e-2, weight_decay=0.5, projections={weight: CurvatureProjection(curvature, threshold)}
    )
    stepped(optimizer, [weight], 50)
    master = weight.detach() if dtype == torch.float32 else optimizer.state[weight]["master"]
    change = master.double() - before
    values, q, k = products(rows, columns)
    coordinates = (q.mT @ change @ k).square()
    assert change.norm() > 0.1
    assert (values > threshold).sum() > 10
    assert coordinates[values > threshold].sum() <= 1e-6 * coordinates.sum()
    # So the whole update is within its budget, not each step's alone.
    assert (coordinates * values).sum() <= 1.0001 * threshold * coordinates.sum() + 1e-6 * values.max()


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_each_step_is_adamw_s_projected(mode):
    curvature = Kronecker.of(moment(6, 1), moment(5, 2), torch.float64)
    projection = CurvatureProjection(curvature, threshold_of([curvature], 0.8), mode)
    weight, plain = (torch.nn.Parameter(random(6, 5, seed=5)) for _ in range(2))
    ours = ProjectedAdamW([weight], lr=1e-2, weight_decay=0.3, projections={weight: projection})
    theirs = torch.optim.AdamW([plain], lr=1e-2, weight_decay=0.3)
    for step in range(5):
        old = weight.detach().clone()
        with torch.no_grad():
            plain.copy_(old)
        stepped(ours, [weight], 1, seed=step)
        stepped(theirs, [plain], 1, seed=step)
        update = plain.detach() - old
        projection.apply_(update)
        torch.testing.assert_close(weight.detach(), old + update, rtol=0, atol=1e-13)


def test_no_curvature_is_plain_adamw():
    flat = CurvatureProjection(Kronecker.of(torch.zeros(6, 6), moment(5, 2)), 0.0)
    params = [torch.nn.Parameter(random(6, 5, dtype=torch.float32)) for _ in range(2)]
    stepped(ProjectedAdamW([params[0]], projections={params[0]: flat}), params[:1], 5)
    stepped(SparseMaskedAdamW([params[1]]), params[1:], 5)
    assert torch.equal(*params)


@pytest.mark.parametrize("rest", ["freeze", "train"])
def test_the_rest(rest):
    curvature = Kronecker.of(moment(6, 1), moment(5, 2))
    projection = CurvatureProjection(curvature, threshold_of([curvature], 0.5))
    named = {name: torch.nn.Parameter(random(*shape)) for name, shape in (("a", (6, 5)), ("b", (6, 5)), ("c", (6,)))}
    before = copy.deepcopy(named)
    optimizer = ProjectedAdamW(list(named.items()), projections={"a": projection}, rest=rest)
    stepped(optimizer, list(named.values()), 2)
    moved = {name for name in named if not torch.equal(named[name], before[name])}
    assert moved == ({"a"} if rest == "freeze" else {"a", "b", "c"})


def test_a_copied_optimizer_goes_on_alike():
    curvature = Kronecker.of(moment(6, 1), moment(5, 2))
    weight = torch.nn.Parameter(random(6, 5, dtype=torch.float32))
    optimizer = ProjectedAdamW([weight], projections={weight: CurvatureProjection(curvature, 1e-3, "soft")})
    stepped(optimizer, [weight], 3)
    other = copy.deepcopy(optimizer)
    (copied,) = other.param_groups[0]["params"]
    stepped(optimizer, [weight], 3, seed=1)
    stepped(other, [copied], 3, seed=1)
    assert copied is not weight
    assert torch.equal(copied, weight)


def test_a_layer_without_room_is_named():
    weight = torch.nn.Parameter(random(3, 3))
    full = CurvatureProjection(Kronecker.of(torch.eye(3), torch.eye(3)), 0.5)
    with pytest.warns(UserWarning, match="parameter 'w': all its directions are protected"):
        optimizer = ProjectedAdamW([("w", weight)], projections={"w": full})
    before = weight.detach().clone()
    stepped(optimizer, [weight], 1)
    assert torch.equal(before, weight)


def test_what_does_not_fit():
    weight = torch.nn.Parameter(random(6, 5))
    good = CurvatureProjection(Kronecker.of(moment(6, 1), moment(5, 2)), 0.1)
    turned = CurvatureProjection(Kronecker.of(moment(5, 1), moment(6, 2)), 0.1)
    with pytest.raises(
        ValueError, match=r"projections: parameter 'w' has shape \(6, 5\), but its projection is for \(5, 6\)"
    ):
        ProjectedAdamW([("w", weight)], projections={"w": turned})
    with pytest.raises(TypeError, match="projections: parameter 'w': expected a projection .*, got Kronecker"):
        ProjectedAdamW([("w", weight)], projections={"w": good.curvature})
    with pytest.raises(ValueError, match="projections: no parameter is named 'v'"):
        ProjectedAdamW([("w", weight)], projections={"v": good})
    with pytest.raises(ValueError, match="projections: parameter 'w' has a RowMask, but what a mask"):
        ProjectedAdamW([("w", weight)], projections={"w": good}, masks={"w": RowMask([0], (6, 5))})
    optimizer = ProjectedAdamW([("w", weight)], projections={"w": good})
    with pytest.raises(ValueError, match="its projection is for"):
        optimizer.set_projections({"w": turned})
    assert optimizer.projections == {"w": good}

    with pytest.raises(ValueError, match="mode: expected one of hard, soft, got 'firm'"):
        CurvatureProjection(good.curvature, 0.1, "firm")
    with pytest.raises(ValueError, match="threshold: expected at least 0, got -1"):
        CurvatureProjection(good.curvature, -1)
    with pytest.raises(ValueError, match=r"rows: expected \(k, k\), or \(k,\) for a diagonal, got \(2, 3\)"):
        Kronecker.of(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match="columns: expected finite numbers"):
        Kronecker.of(torch.ones(2), torch.full((2, 2), float("nan")))
    with pytest.raises(ValueError, match=r"energy: expected a share in \(0, 1\], got 0"):
        threshold_of([good.curvature], 0)
    with pytest.raises(ValueError, match="there is nothing to protect"):
        threshold_of([Kronecker.of(torch.zeros(2), torch.ones(2))], 0.5)
