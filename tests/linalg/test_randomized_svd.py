"""randomized_svd: residuals and singular values beside the best there are, on spectra that are known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl import ops, reference
from sparse_cl.linalg import randomized_svd

RANK = 32
SPECTRA = {"1/i": lambda i: 1 / (i + 1), "0.9^i": lambda i: 0.9**i}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def rotation(n, seed):
    """Orthogonal (n, n) float64: a cosine transform of random signs, much faster made than by QR."""
    i = torch.arange(n, dtype=torch.float64)
    cosines = torch.cos(math.pi / n * (i[:, None] + 0.5) * i) * math.sqrt(2 / n)
    cosines[:, 0] /= math.sqrt(2)
    left, right = ((torch.randint(2, (n,), generator=seeded(seed + s)) * 2 - 1).double() for s in (0, 100))
    return left[:, None] * cosines * right


def with_spectrum(m, n, spectrum):
    """(m, n) float64 with the first min(m, n) values of a spectrum, and they."""
    values = SPECTRA[spectrum](torch.arange(min(m, n), dtype=torch.float64))
    return (rotation(m, 1)[:, : len(values)] * values) @ rotation(n, 2)[:, : len(values)].mT, values


def check_factors(u, s, vh):
    """Orthonormal vectors where there is a value, zeros where there is none; values descend."""
    present = (s > 0).double()
    assert (s[..., :-1] >= s[..., 1:]).all()
    for vectors in (u.mT, vh):
        gram = vectors.double() @ vectors.double().mT
        assert ((gram - torch.diag_embed(present)).abs() <= 1e-5).all()


@pytest.mark.parametrize(("power_iterations", "excess", "value_error"), [(1, 1.05, 5e-3), (2, 1.01, 1e-3)])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(256, 256), (400, 1024), (1500, 300), (2048, 2048)])
def test_residual_and_values_beside_the_best(shape, spectrum, power_iterations, excess, value_error):
    exact, values = with_spectrum(*shape, spectrum)
    a = exact.float()
    for seed in range(3 if max(shape) < 2000 else 1):
        u, s, vh = randomized_svd(a, RANK, power_iterations=power_iterations, generator=seeded(seed))
        check_factors(u, s, vh)
        residual = torch.linalg.norm(exact - (u.double() * s) @ vh.double())
        assert residual <= excess * torch.linalg.norm(values[RANK:])
        half = RANK // 2
        assert ((s[:half].double() - values[:half]).abs() <= value_error * values[:half]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_that_the_matrix_has_is_found_exactly(dtype):
    a = gaussian(120, 7, dtype=dtype) @ gaussian(7, 90, seed=1, dtype=dtype)
    u, s, vh = randomized_svd(a, 20, power_iterations=0, generator=seeded())
    check_factors(u, s, vh)
    assert (s > 0).sum() == 7
    assert not u[:, 7:].any() and not vh[7:].any()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close((u * s) @ vh, a, rtol=0, atol=tolerance * a.abs().max().item() * 7)
    torch.testing.assert_close(s[:7], torch.linalg.svdvals(a)[:7], rtol=tolerance, atol=0)


@given(
    m=st.integers(0, 40),
    n=st.integers(0, 40),
    rank=st.integers(0, 40),
    oversample=st.integers(0, 9),
    power_iterations=st.integers(0, 2),
    true_rank=st.integers(0, 12),
    batch=st.sampled_from([(), (3,), (2, 2), (0,)]),
)
def test_any_shape(m, n, rank, oversample, power_iterations, true_rank, batch):
    """Shapes of all sizes; a sketch as wide as the true rank loses nothing."""
    rank = min(rank, m, n)
    a = gaussian(*batch, m, true_rank) @ gaussian(*batch, true_rank, n, seed=1)
    u, s, vh = randomized_svd(a, rank, oversample, power_iterations, seeded())
    assert u.shape == (*batch, m, rank) and s.shape == (*batch, rank) and vh.shape == (*batch, rank, n)
    check_factors(u, s, vh)
    assert ((s > 0).sum(-1) <= min(true_rank, m, n)).all()
    if rank >= min(true_rank, m, n):
        # A sketch no wider than the rank may be ill-conditioned, and power iterations cannot mend that.
        slack = 1e-4 if rank + oversample >= true_rank + 4 else 1e-2
        torch.testing.assert_close((u * s[..., None, :]) @ vh, a, rtol=0, atol=slack * max(1.0, true_rank))


def test_same_seed_same_bits_other_seed_other_sketch():
    a = gaussian(150, 100)
    first, again, other = (randomized_svd(a, 10, generator=seeded(seed)) for seed in (5, 5, 6))
    for x, y in zip(first, again, strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(first[1], other[1])


def test_without_a_generator_torch_s_seed_decides():
    a = gaussian(60, 50)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(randomized_svd(a, 5)[1])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_a_batch_is_a_loop_of_its_matrices():
    a = gaussian(2, 3, 80, 120)
    a[1, 1] = gaussian(80, 2) @ gaussian(2, 120)
    u, s, vh = randomized_svd(a, 6, generator=seeded())
    for i in range(2):
        for j in range(3):
            one = randomized_svd(a[i, j], 6, generator=seeded())
            torch.testing.assert_close(s[i, j], one[1], rtol=1e-5, atol=0)
            torch.testing.assert_close((u * s[..., None, :]) @ vh, (u * s[..., None, :]) @ vh)
            product = (u[i, j] * s[i, j]) @ vh[i, j]
            torch.testing.assert_close(product, (one[0] * one[1]) @ one[2], rtol=0, atol=1e-3)


def test_native_factor_and_reference_agree(monkeypatch):
    a = gaussian(90, 70)
    mine = randomized_svd(a, 10, generator=seeded())
    monkeypatch.setattr(ops, "gram_factor", reference.gram_factor)
    expected = randomized_svd(a, 10, generator=seeded())
    torch.testing.assert_close(mine[1], expected[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_computed_and_returned_in_float32(dtype):
    a = gaussian(60, 40).to(dtype)
    for mine, expected in zip(
        randomized_svd(a, 5, generator=seeded()), randomized_svd(a.float(), 5, generator=seeded()), strict=True
    ):
        assert torch.equal(mine, expected)


def test_settings_of_the_caller_do_not_matter():
    a = gaussian(100, 80)
    expected = randomized_svd(a, 8, generator=seeded())[1]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mine = randomized_svd(a, 8, generator=seeded())[1]
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(mine, expected)
