"""SOAP against its formulas in float64, and AdamW where there is no basis."""

from __future__ import annotations

import pytest
import torch

from benchmarks.arena.soap import SOAP

# At the first step the turned gradient is diagonal: with a small eps its other entries are noise over noise.
BETAS, EPS, LR, DECAY = (0.9, 0.95), 1e-3, 1e-2, 0.1


def gradients(shape, steps):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


@pytest.mark.parametrize(("shape", "most"), [((6, 6), 2048), ((5, 7), 6), ((8, 3), 2)])
def test_steps_are_adamw_s_in_the_eigenbasis(shape, most):
    start = torch.linspace(-1, 1, shape[0] * shape[1], dtype=torch.float64).view(shape)
    p = torch.nn.Parameter(start.clone())
    optimizer = SOAP([p], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, frequency=3, most=most)
    w, m, v = start.clone(), torch.zeros(shape).double(), torch.zeros(shape).double()
    moments = [torch.zeros(n, n).double() for n in shape]
    bases = [torch.eye(n).double() for n in shape]
    for step, g in enumerate(gradients(shape, 8), 1):
        for side, rows in enumerate((g, g.mT)):
            moments[side] = BETAS[1] * moments[side] + (1 - BETAS[1]) * rows @ rows.mT
            if shape[side] <= most and step % 3 == 1:
                bases[side] = torch.linalg.eigh(moments[side])[1].flip(1)
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * (bases[0].mT @ g @ bases[1]) ** 2
        turned = bases[0].mT @ m @ bases[1] / (1 - BETAS[0] ** step)
        w = w * (1 - LR * DECAY) - LR * bases[0] @ (turned / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS)) @ bases[1].mT
        p.grad = g
        optimizer.step()
        torch.testing.assert_close(p.detach(), w, rtol=1e-10, atol=1e-12)


def test_without_a_basis_it_is_adamw():
    found, expected = (torch.nn.Parameter(torch.ones(6, dtype=torch.float64)) for _ in range(2))
    optimizers = [
        SOAP([found], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY),
        torch.optim.AdamW([expected], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY),
    ]
    for g in gradients((6,), 5):
        found.grad, expected.grad = g, g.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
