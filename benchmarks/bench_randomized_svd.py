"""randomized_svd against torch.svd_lowrank with as many products, and torch.linalg.svd; accuracy beside time.

Rank 32 of square matrices whose singular values fall as 1/i or 0.9^i. ``excess``: the Frobenius residual over the least
possible, less 1. ``value error``: the largest relative error of the first 16 singular values.
"""

import pytest
import torch

from sparse_cl.linalg import randomized_svd

RANK, OVERSAMPLE = 32, 8
SPECTRA = {"1/i": lambda i: 1 / (i + 1), "0.9^i": lambda i: 0.9**i}
CONTENDERS = ["ours", "svd_lowrank", "linalg.svd"]


@pytest.fixture(scope="module")
def matrices(device):
    """n, spectrum -> float32 matrix, its singular values in float64."""
    made = {}

    def make(n, spectrum):
        if (n, spectrum) not in made:
            torch.manual_seed(0)
            values = SPECTRA[spectrum](torch.arange(n, dtype=torch.float64))
            left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for _ in range(2))
            made[n, spectrum] = ((left * values) @ right.mT).float().to(device), values.to(device)
        return made[n, spectrum]

    return make


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("power_iterations", [1, 2])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("n", [1024, 2048])
def test_randomized_svd(benchmark, waiting, matrices, n, spectrum, power_iterations, contender):
    if contender == "linalg.svd" and (n > 1024 or power_iterations > 1 or spectrum != "1/i"):
        pytest.skip("takes long, and has no power iterations")
    a, values = matrices(n, spectrum)

    def call():
        if contender == "ours":
            return randomized_svd(a, RANK, OVERSAMPLE, power_iterations)
        if contender == "linalg.svd":
            return torch.linalg.svd(a, full_matrices=False)
        u, s, v = torch.svd_lowrank(a, RANK + OVERSAMPLE, niter=power_iterations)
        return u, s, v.mT

    torch.manual_seed(0)
    u, s, vh = call()
    u, s, vh = u[:, :RANK].double(), s[:RANK].double(), vh[:RANK].double()
    half = RANK // 2
    facts = {
        "excess": (torch.linalg.norm(a.double() - (u * s) @ vh) / torch.linalg.norm(values[RANK:]) - 1).item(),
        "value error": ((s - values[:RANK]) / values[:RANK])[:half].abs().max().item(),
    }
    case = f"{n}, {spectrum}, {power_iterations} iterations"
    benchmark.group = case
    benchmark.extra_info.update(case=case, contender=contender, baseline="svd_lowrank", **facts)
    benchmark.pedantic(waiting(call), rounds=1 if contender == "linalg.svd" else 5, warmup_rounds=1)
