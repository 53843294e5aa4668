"""AdamW and the three rules of a low-rank correction, written out in float64 by other formulas than the optimizers'."""

from __future__ import annotations

import torch

from sparse_cl import DriftBudget, LowRankPull, Subspace, SubspaceProjection

M, N, R = 24, 32, 5


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def basis(n=N, r=R, seed=0):
    return torch.linalg.qr(random(n, n, seed=seed)).Q[:, :r]


def energies(r=R, seed=0, most=300.0):
    return most * torch.rand(r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def subspace(dtype=torch.float32, n=N, r=R, seed=0):
    return Subspace(basis(n, r, seed).to(dtype), energies(r, seed).to(dtype), outside=20.0)


def gradient(step, m=M, n=N):
    """One that insists on some of the directions."""
    return random(m, 2, seed=1) @ basis(n)[:, :2].mT * 3 + random(m, n, seed=100 + step)


def parameter(dtype=torch.float32, *shape, seed=2):
    return torch.nn.Parameter(random(*(shape or (M, N)), seed=seed, dtype=dtype))


def run(optimizer, weight, steps, first=0, each=lambda step: None):
    """Steps on `gradient`; `each` is called with the number of a step after it."""
    for step in range(first, first + steps):
        weight.grad = gradient(step).to(weight.dtype)
        optimizer.step()
        each(step)


def stepped(optimizer, weight):
    """What the optimizer steps: a weight's master, where it has one."""
    return optimizer.state[weight].get("master", weight.detach()).double()


def follow(optimizer, oracle, weight, each=lambda: None):
    """Fifty steps of both on a linear schedule from 1e-2 on; `each` is called after every one."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 60)
    for step in range(50):
        weight.grad = gradient(step).to(weight.dtype)
        oracle.step(weight.grad, 1e-2 * (1 - step / 60))
        optimizer.step()
        schedule.step()
        each()


def rms(weight):
    """What a strength of ElasticAdamW is relative to."""
    return float(weight.detach().double().square().mean().sqrt())


RULES = {
    "hard": lambda s: SubspaceProjection(s),
    "pull": lambda s: LowRankPull(s, s.values),
    "budget": lambda s: DriftBudget(s, 1e-3),
}


def drift(weight, start, s):
    """Σ λ_j ‖(W - W₀) u_j‖² / Σ λ_j ‖W₀ u_j‖²."""
    u, values = s.basis.double(), s.values.double()
    moved, held = ((x.double() @ u).square().sum(0) @ values for x in (weight - start, start))
    return float(moved / held)


class Oracle:
    """The nearest weights, in the sense of a rule, to those that AdamW makes."""

    def __init__(self, rule, weight, s, decay=0.1, betas=(0.9, 0.999), eps=1e-8, every=1):
        self.rule, self.decay, self.betas, self.eps = rule, decay, betas, eps
        self.w = self.start = weight.detach().double().clone()
        self.u, self.values = s.basis.double(), s.values.double()
        self.first = self.second = self.path = 0.0
        self.t, self.every = 0, every

    def step(self, grad, lr):
        g, self.t = grad.double(), self.t + 1
        self.first = self.betas[0] * self.first + (1 - self.betas[0]) * g
        self.second = self.betas[1] * self.second + (1 - self.betas[1]) * g * g
        first, second = self.first / (1 - self.betas[0] ** self.t), self.second / (1 - self.betas[1] ** self.t)
        self.w = self.w - lr * (first / (second.sqrt() + self.eps) + self.decay * self.w)
        self.path += lr
        if self.t % self.every == 0:
            self.w = self.start + getattr(self, self.rule)(self.w - self.start, self.path)
            self.path = 0.0

    def hard(self, moved, lr):
        return moved @ (torch.eye(len(self.u), dtype=torch.float64) - self.u @ self.u.mT)

    def pull(self, moved, lr):
        return self._solved(moved, lr)

    def budget(self, moved, lr):
        """By bisection on the multiplier."""
        held = float((self.start @ self.u).square().sum(0) @ self.values)

        def excess(nu):
            return float((self._solved(moved, nu) @ self.u).square().sum(0) @ self.values) - 1e-3 * held

        if excess(0.0) <= 0:
            return moved
        low, high = 0.0, 1.0
        while excess(high) > 0:
            high *= 2
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) > 0 else (low, middle)
        return self._solved(moved, high)

    def _solved(self, moved, factor):
        """D (I + factor U diag(λ) Uᵀ)⁻¹."""
        system = torch.eye(len(self.u), dtype=torch.float64) + factor * (self.u * self.values) @ self.u.mT
        return torch.linalg.solve(system, moved.mT).mT
