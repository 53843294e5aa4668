"""The pull along a few directions, against AdamW and the proximal step written out in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from sparse_cl import ops
from sparse_cl.masks import RowMask
from sparse_cl.nn import ActiveLinear
from sparse_cl.optim import SparseMaskedAdamW
from sparse_cl.optim.low_rank_pull import LowRankPull
from sparse_cl.optim.projected_adamw import ProjectedAdamW

M, N, R = 24, 32, 5
KEY = "projection.moved"


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def basis(n=N, r=R, seed=0):
    return torch.linalg.qr(random(n, n, seed=seed)).Q[:, :r]


def strengths(r=R, seed=0, most=300.0):
    return most * torch.rand(r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pull(dtype=torch.float32, **given):
    return LowRankPull(basis(**given).to(dtype), strengths(given.get("r", R)).to(dtype))


class Oracle:
    """AdamW on W, then the minimum over W' of ½‖W' - W‖² + lr ½ Σ_j κ_j ‖(W' - W₀) u_j‖²; float64 throughout."""

    def __init__(self, weight, u, kappa, decay, betas=(0.9, 0.999), eps=1e-8):
        self.w = self.anchor = weight.detach().double().clone()
        self.u, self.kappa, self.decay, self.betas, self.eps = u.double(), kappa.double(), decay, betas, eps
        self.first = self.second = 0.0
        self.t = 0

    def step(self, gradient, lr):
        g, self.t = gradient.double(), self.t + 1
        self.first = self.betas[0] * self.first + (1 - self.betas[0]) * g
        self.second = self.betas[1] * self.second + (1 - self.betas[1]) * g * g
        first, second = self.first / (1 - self.betas[0] ** self.t), self.second / (1 - self.betas[1] ** self.t)
        w = self.w - lr * (first / (second.sqrt() + self.eps) + self.decay * self.w)
        # By the inverse of I + lr U diag(κ) Uᵀ, rather than by the optimizer's formula.
        system = torch.eye(len(self.u), dtype=torch.float64) + lr * (self.u * self.kappa) @ self.u.mT
        self.w = self.anchor + torch.linalg.solve(system, (w - self.anchor).mT).mT


def inside(step):
    """A gradient that insists on some of the directions."""
    return random(M, 2, seed=1) @ basis()[:, :2].mT * 3 + random(M, N, seed=100 + step)


def stepped_weights(optimizer, weight):
    return optimizer.state[weight].get("master", weight.detach()).double()


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rate", ["float", "tensor"])
def test_fifty_steps_of_a_schedule(dtype, rate):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.nn.Parameter(random(M, N, seed=2, dtype=dtype))
    projection = pull(wide)
    oracle = Oracle(weight, projection.basis, projection.strengths, decay=0.1)
    lr = torch.tensor(1e-2, dtype=torch.float64) if rate == "tensor" else 1e-2
    optimizer = ProjectedAdamW([weight], lr=lr, weight_decay=0.1, projections={weight: projection})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 60)
    for step in range(50):
        weight.grad = inside(step).to(dtype)
        oracle.step(weight.grad, 1e-2 * (1 - step / 60))
        optimizer.step()
        schedule.step()
    ours = stepped_weights(optimizer, weight)
    assert (ours - oracle.w).abs().max() <= 10 * TOLERANCE[dtype] * oracle.w.abs().max()
    moved, expected = optimizer.state[weight][KEY], (ours - oracle.anchor) @ projection.basis.double()
    assert moved.shape == (M, R) and moved.dtype == wide
    assert expected.norm() > 0.03
    assert (moved.double() - expected).norm() <= 1e-4 * expected.norm()
    if dtype == torch.bfloat16:
        assert torch.equal(weight.detach(), ours.to(dtype))


def test_the_pull_holds_back_what_adamw_alone_would_do():
    ends = []
    for most in (0.0, 1e2, 1e30):
        weight = torch.nn.Parameter(random(M, N, seed=2, dtype=torch.float32))
        before = weight.detach().clone()
        projection = LowRankPull(basis().float(), torch.full((R,), most))
        optimizer = ProjectedAdamW([weight], lr=1e-2, projections={weight: projection})
        for step in range(30):
            weight.grad = inside(step).float()
            optimizer.step()
        ends.append(float(((weight.detach() - before) @ basis().float()).norm()))
    assert ends[0] > 3 * ends[1]
    assert ends[2] <= 1e-4 * ends[0]


def test_no_strength_is_plain_adamw():
    ours, plain = (torch.nn.Parameter(random(M, N, dtype=torch.float32)) for _ in range(2))
    first = ProjectedAdamW([ours], projections={ours: LowRankPull(basis().float(), torch.zeros(R))})
    second = SparseMaskedAdamW([plain])
    for step in range(3):
        ours.grad = plain.grad = inside(step).float()
        first.step()
        second.step()
    assert torch.equal(ours, plain)
    assert KEY not in first.state[ours]


def test_a_skipped_step_changes_nothing():
    weight = torch.nn.Parameter(random(M, N, dtype=torch.float32))
    optimizer = ProjectedAdamW([weight], lr=1e-2, projections={weight: pull()})
    weight.grad = inside(0).float()
    optimizer.step()
    before, state = weight.detach().clone(), copy.deepcopy(dict(optimizer.state[weight]))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor([1.0])
    weight.grad = torch.full((M, N), torch.nan)
    optimizer.step()
    assert torch.equal(weight.detach(), before)
    assert all(torch.equal(state[name], value) for name, value in optimizer.state[weight].items())
    optimizer.found_inf = torch.tensor([0.0])
    weight.grad = inside(1).float()
    optimizer.step()
    assert not torch.equal(weight.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_goes_on_with_the_same_bits(dtype, tmp_path):
    first = torch.nn.Parameter(random(M, N, dtype=dtype))
    optimizer = ProjectedAdamW([("w", first)], lr=1e-2, projections={"w": pull()})
    for step in range(3):
        first.grad = inside(step).to(dtype)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    second = torch.nn.Parameter(first.detach().clone())
    resumed = ProjectedAdamW([("w", second)], lr=1e-2, projections={"w": pull()})
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(resumed.state[second][KEY], optimizer.state[first][KEY])
    assert resumed.state[second][KEY].dtype == torch.float32
    copied = copy.deepcopy(resumed)
    (third,) = copied.param_groups[0]["params"]
    for step in range(3, 6):
        first.grad = second.grad = third.grad = inside(step).to(dtype)
        for each in (optimizer, resumed, copied):
            each.step()
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert optimizer.state[first][KEY].any()
    assert torch.equal(optimizer.state[first][KEY], copied.state[third][KEY])


def test_a_new_pull_begins_where_the_weight_is():
    weight = torch.nn.Parameter(random(M, N, dtype=torch.float32))
    optimizer = ProjectedAdamW([weight], lr=1e-2, projections={weight: pull()})
    weight.grad = inside(0).float()
    optimizer.step()
    optimizer.set_projections(optimizer.projections)
    assert optimizer.state[weight][KEY].any()
    optimizer.set_projections({weight: pull(seed=3, r=4)})
    assert KEY not in optimizer.state[weight]
    before = weight.detach().clone()
    optimizer.step()
    expected = (weight.detach() - before) @ basis(seed=3, r=4).float()
    torch.testing.assert_close(optimizer.state[weight][KEY], expected, rtol=1e-4, atol=1e-6)


def test_a_leaf_of_rows_is_pulled_by_its_rows():
    rows = [1, 4, 7, 8]
    leaf = ActiveLinear(N, M, bias=False, mask=RowMask(rows, (M, N)))
    dense = torch.nn.Parameter(leaf.weight.detach()[rows].clone())
    ours = ProjectedAdamW([leaf.active], lr=1e-2, projections={leaf.active: pull()})
    plain = ProjectedAdamW([dense], lr=1e-2, projections={dense: pull()})
    for step in range(5):
        leaf.active.grad = dense.grad = inside(step)[rows].float()
        ours.step()
        plain.step()
    torch.testing.assert_close(leaf.weight.detach()[rows], dense.detach(), rtol=0, atol=1e-6)
    assert ours.state[leaf.active][KEY].shape == (4, R)


@pytest.mark.parametrize("broken", ["masked_adamw_", "apply_updates_"])
def test_a_step_that_breaks_off_leaves_the_weights_and_where_they_are(monkeypatch, broken):
    weight = torch.nn.Parameter(random(M, N, dtype=torch.float32))
    optimizer = ProjectedAdamW([weight], lr=1e-2, projections={weight: pull()})
    weight.grad = inside(0).float()
    optimizer.step()
    before, moved = weight.detach().clone(), optimizer.state[weight][KEY].clone()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ops, broken, interrupted)
        optimizer.step()
    assert torch.equal(weight.detach(), before)
    assert torch.equal(optimizer.state[weight][KEY], moved)


def test_what_does_not_fit():
    u = basis().float()
    with pytest.raises(ValueError, match="basis: its columns are not orthonormal"):
        LowRankPull(2 * u, torch.ones(R))
    for wrong in (torch.ones(R + 1), -torch.ones(R), torch.full((R,), torch.inf)):
        with pytest.raises(ValueError, match=r"strengths: expected \(5,\) finite numbers of at least 0, one for each"):
            LowRankPull(u, wrong)
    with pytest.raises(TypeError, match="basis: expected a float32 or float64 tensor"):
        LowRankPull(u.bfloat16(), torch.ones(R))
    weight = torch.nn.Parameter(random(M, N + 1, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"'w' has shape \(24, 33\), but its projection is for \(m, 32\)"):
        ProjectedAdamW([("w", weight)], projections={"w": LowRankPull(u, torch.ones(R))})
    masked = {"w": RowMask([0], (M, N + 1))}
    with pytest.raises(
        ValueError, match="'w' has a RowMask, but what a mask leaves of an update lies in other directions"
    ):
        ProjectedAdamW([("w", weight)], projections={"w": LowRankPull(u, torch.ones(R))}, masks=masked)


def test_a_state_of_another_rank_is_refused():
    first, second = (torch.nn.Parameter(random(M, N, dtype=torch.float32)) for _ in range(2))
    optimizer = ProjectedAdamW([("w", first)], projections={"w": pull()})
    first.grad = second.grad = inside(0).float()
    optimizer.step()
    other = ProjectedAdamW([("w", second)], projections={"w": pull(r=4)})
    other.load_state_dict(optimizer.state_dict())
    before = second.detach().clone()
    with pytest.raises(
        ValueError, match=r"state of parameter 'w': projection.moved: expected .* \(24, 4\), got .* \(24"
    ):
        other.step()
    assert torch.equal(second.detach(), before)
