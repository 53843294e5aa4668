"""What a memory says of energies, against the sum of all domains' second moments in float64."""

import pytest
import torch
from cases.subspace import gradients, observe_all, orthogonal, weight, with_gap
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_cl import SubspaceMemory

WIDE = 1100


def moment(seen):
    """E[x xᵀ] over the rows of these matrices."""
    rows = torch.cat(seen).double()
    return rows.mT @ rows / len(rows)


def known(memory, key="w"):
    """U diag(λ) Uᵀ."""
    subspace = memory.subspace(key).to(dtype=torch.float64)
    return subspace.basis * subspace.values @ subspace.basis.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "max_rank"), [(64, None), (64, 12), (WIDE, 12), (WIDE, 40)])
def test_energies_of_one_domain(n, max_rank, dtype):
    """Σ λ + τ is all there is, whatever is kept; a sketch's λ_j are not above the true ones, and little below."""
    seen = [g.to(dtype) for g in gradients(with_gap(n, 20), 32, steps=5)]
    param = weight(32, n, dtype)
    memory = SubspaceMemory([("w", param)], max_rank=max_rank, energy=0.99)
    observe_all(memory, param, seen)
    memory.consolidate()
    subspace, whole = memory.subspace("w"), moment(seen)
    true = torch.linalg.eigvalsh(whole).flip(0)[: subspace.rank]
    values = subspace.values.double()
    sketched = n > 1024
    rounding = 1e-5 * float(true[0])
    assert (values <= true + rounding).all()
    assert (values >= true * (0.9 if sketched else 1) - rounding).all()
    assert subspace.total == pytest.approx(float(whole.trace()), rel=1e-5)
    assert subspace.mean == pytest.approx(float(whole.trace()) / n, rel=1e-5)
    if not sketched:
        # And τ is what lies outside.
        along = (subspace.basis.double().mT @ whole @ subspace.basis.double()).trace()
        assert subspace.outside == pytest.approx(float(whole.trace() - along), abs=1e-4 * float(whole.trace()))
        torch.testing.assert_close(values, true, rtol=1e-4, atol=rounding)


@given(
    n=st.integers(1, 14),
    max_rank=st.sampled_from([None, 1, 4]),
    energy=st.sampled_from([0.5, 0.9, 1.0]),
    domains=st.lists(st.tuples(st.sampled_from([0.2, 1.0, 3.0]), st.sampled_from([0.0, 0.5, 0.9, 1.0])), max_size=5),
)
def test_domains_add_up_by_weight_and_fade(n, max_rank, energy, domains):
    """A = Σ w_d γ…γ E_d[x xᵀ] is U diag(λ) Uᵀ and a remainder of trace τ; of A's own eigenvectors, nowhere negative."""
    param = weight(6, n, torch.float64)
    memory = SubspaceMemory([("w", param)], max_rank=max_rank and min(n, max_rank), energy=energy)
    whole, weights = torch.zeros(n, n, dtype=torch.float64), 0.0
    for number, (share, fade) in enumerate(domains):
        seen = gradients(0.6 ** torch.arange(n, dtype=torch.float64), 6, 1 + number % 2, seed=number)
        observe_all(memory, param, seen)
        memory.consolidate(share, fade)
        whole, weights = fade * whole + share * moment(seen), fade * weights + share
        subspace = memory.subspace("w")
        rest = whole - known(memory)
        if max_rank is not None:
            assert float(torch.linalg.eigvalsh(rest).min()) >= -1e-10
        assert float(rest.trace()) == pytest.approx(subspace.outside, abs=1e-10)
        assert subspace.mean == pytest.approx(float(whole.trace()) / n / weights, rel=1e-12)
        if max_rank is None:
            assert subspace.outside <= (1 - energy + 1e-6) * float(whole.trace())
        if energy == 1 and max_rank is None:
            torch.testing.assert_close(known(memory), whole, rtol=0, atol=1e-6 * float(whole.trace()))


@pytest.mark.parametrize("max_rank", [10, 60])
def test_a_sketch_adds_domains_up_too(max_rank):
    param, directions = weight(48, WIDE), orthogonal(WIDE)
    memory = SubspaceMemory([("w", param)], max_rank=max_rank, energy=0.98)
    whole = torch.zeros(WIDE, WIDE, dtype=torch.float64)
    for number, (share, fade) in enumerate([(0.5, 1.0), (1.0, 0.8), (2.0, 0.8)]):
        seen = gradients(with_gap(WIDE, 16), 48, 3, seed=number, directions=directions.roll(-8 * number, 1))
        observe_all(memory, param, seen)
        memory.consolidate(share, fade)
        whole = fade * whole + share * moment(seen)
    subspace, rest = memory.subspace("w"), whole - known(memory)
    assert subspace.total == pytest.approx(float(whole.trace()), rel=1e-5)
    assert float(torch.linalg.eigvalsh(rest).min()) >= -1e-5 * float(whole.trace())
    if max_rank == 60:
        assert float(rest.trace()) <= 0.05 * float(whole.trace())


@pytest.mark.parametrize("fade", [0.0, 0.5, 0.9])
def test_strengths_stay_bounded_over_twenty_domains(fade):
    """Whatever comes, no direction is used more than 1 / (1 - fade) times what one domain can use it."""
    n, param = 24, weight(16, 24)
    memory = SubspaceMemory([("w", param)], max_rank=8, energy=1.0)
    for domain in range(20):
        # One domain after another uses the same three directions, and others that change.
        shared = torch.where(torch.arange(n) < 3, 1.0, 0.0).double()
        seen = gradients(shared, 16, 1, seed=domain, directions=orthogonal(n))
        seen += gradients(0.3 * torch.ones(n, dtype=torch.float64), 16, 1, seed=100 + domain)
        observe_all(memory, param, seen)
        memory.consolidate(fade=fade)
        assert float(memory.subspace("w").usage.max()) <= n / (1 - fade)
    last = memory.subspace("w").usage
    observe_all(memory, param, seen)
    memory.consolidate(fade=fade)
    torch.testing.assert_close(memory.subspace("w").usage[:3], last[:3], rtol=0.5, atol=0)
    assert memory.rank("w") == 8


def test_what_a_domain_does_not_see_fades_with_it():
    first, second = weight(8, 12), weight(8, 12)
    memory = SubspaceMemory([("first", first), ("second", second)])
    first.grad, second.grad = torch.randn(8, 12), torch.randn(8, 12)
    memory.observe()
    memory.consolidate()
    before = memory.subspace("second")
    first.grad, second.grad = torch.randn(8, 12), None
    memory.observe()
    memory.consolidate(fade=0.5)
    after = memory.subspace("second")
    assert torch.equal(after.basis, before.basis)
    torch.testing.assert_close(after.usage, before.usage / 2)
    assert after.outside == before.outside / 2
    second.grad = torch.randn(8, 12)
    memory.observe()
    memory.consolidate()
    expected = 0.5 * before.total + float(second.grad.square().sum()) / 8
    assert memory.subspace("second").total == pytest.approx(expected, rel=1e-5)
    assert memory.subspace("second").mean == pytest.approx(expected / 12 / 1.5, rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("n", [40, WIDE])
def test_of_few_directions_no_more_are_kept(n, rank, tmp_path):
    """And none of zeros: what is written can be read."""
    param = weight(16, n)
    memory = SubspaceMemory([("w", param)], max_rank=20, energy=1.0)
    scales = torch.where(torch.arange(n) < rank, 0.03 ** torch.arange(n, dtype=torch.float64), 0.0)
    for domain in range(2):
        observe_all(memory, param, gradients(scales, 16, 2, seed=domain, directions=orthogonal(n)))
        memory.consolidate()
    assert memory.rank("w") <= 2 * rank
    memory.save(tmp_path / "memory.safetensors")
    assert torch.equal(SubspaceMemory.load(tmp_path / "memory.safetensors").basis("w"), memory.basis("w"))


@pytest.mark.parametrize("n", [16, WIDE])
def test_inputs_that_are_always_zero_use_nothing(n):
    model = nn.Linear(n, 3)
    memory = SubspaceMemory(model, max_rank=8, source="inputs")
    for _ in range(2):
        with memory.watch():
            model(torch.zeros(5, n))
        memory.observe()
        assert memory.consolidate() == {"weight": 0}
    subspace = memory.subspace("weight")
    assert (subspace.rank, subspace.total, subspace.mean, subspace.usage.tolist()) == (0, 0.0, 0.0, [])
    assert memory.capacity(by_use=True)["weight"] == {"width": n, "used": 0, "free": n}


def test_capacity_by_use_counts_a_direction_by_how_much_it_is_used():
    n, param = 10, weight(30, 10, torch.float64)
    memory = SubspaceMemory([("w", param)], energy=1.0)
    seen = gradients(0.5 ** torch.arange(n, dtype=torch.float64), 30, 3)
    for texts in (1, 2):
        observe_all(memory, param, seen)
        memory.consolidate()
        # h(A) = A (A + μ)⁻¹ without eigenvectors.
        mean = moment(seen).trace() / n
        part = texts * moment(seen) @ torch.linalg.inv(texts * moment(seen) + mean * torch.eye(n))
        used = round(float(part.trace()))
        assert memory.capacity(by_use=True)["w"] == {"width": n, "used": used, "free": n - used}
        assert memory.capacity()["w"]["used"] == memory.rank("w") == n
        matrix = torch.randn(4, n, dtype=torch.float64)
        expected = float((matrix @ part).mul(matrix).sum() / matrix.square().sum())
        assert memory.share_inside("w", matrix, by_use=True) == pytest.approx(expected, rel=1e-5)
        assert memory.share_inside("w", matrix) == pytest.approx(1.0)
        assert memory.share_inside("w", torch.stack([matrix, matrix])) == pytest.approx(1.0)
