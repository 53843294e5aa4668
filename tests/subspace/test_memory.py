"""A memory finds what an oracle finds that keeps every gradient, in one pass and bounded space."""

import copy
import pickle

import pytest
import torch
from cases.subspace import Oracle, gradients, largest_angle, observe_all, orthogonal, weight, with_gap
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_cl import Subspace, SubspaceMemory

EXACT, SKETCHED = 96, 1100


def remember(n, seen, rows=64, dtype=torch.float32, **settings):
    param = weight(rows, n, dtype)
    memory = SubspaceMemory([("w", param)], **settings)
    observe_all(memory, param, seen)
    memory.consolidate()
    return memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("n", "max_rank"), [(EXACT, None), (EXACT, 40), (SKETCHED, 40), (SKETCHED, None)])
def test_rank_and_angles_at_a_gap(n, max_rank, dtype):
    seen = [g.to(dtype) for g in gradients(with_gap(n, 24), 64, steps=5)]
    oracle = Oracle(n, 0.98)
    oracle.learn(seen)
    memory = remember(n, seen, dtype=dtype, max_rank=max_rank, energy=0.98)
    assert abs(memory.rank("w") - oracle.basis.shape[1]) <= 1
    assert memory.basis("w").shape == (n, memory.rank("w"))
    assert largest_angle(memory.basis("w"), oracle.basis) <= 1e-2
    assert oracle.basis.shape[1] > 15


@pytest.mark.parametrize(
    ("n", "max_rank", "decay"), [(EXACT, None, 0.8), (EXACT, None, 0.95), (EXACT, None, 0.99), (SKETCHED, 64, 0.8)]
)
@pytest.mark.parametrize("energy", [0.5, 0.8, 0.95])
def test_ranks_without_a_gap(n, max_rank, decay, energy):
    seen = gradients(decay ** torch.arange(n, dtype=torch.float64), 64, steps=4)
    oracle = Oracle(n, energy, max_rank)
    oracle.learn(seen)
    memory = remember(n, seen, max_rank=max_rank, energy=energy)
    assert abs(memory.rank("w") - oracle.basis.shape[1]) <= 1
    kept = torch.cat(seen) @ memory.basis("w").double()
    best = torch.cat(seen) @ oracle.basis[:, : memory.rank("w")]
    assert kept.square().sum() >= 0.99 * best.square().sum()


@pytest.mark.parametrize("energy", [0.3, 0.5])
def test_a_sketch_that_is_too_narrow_keeps_too_much_rather_than_too_little(energy):
    """256 directions matter here and the sketch has 72 columns: it sees less energy in each than there is."""
    seen = gradients(0.99 ** torch.arange(SKETCHED, dtype=torch.float64), 64, steps=4)
    oracle = Oracle(SKETCHED, energy)
    oracle.learn(seen)
    memory = remember(SKETCHED, seen, max_rank=64, energy=energy)
    assert oracle.basis.shape[1] <= memory.rank("w") <= 1.4 * oracle.basis.shape[1]
    rows = torch.cat(seen)
    assert (rows @ memory.basis("w").double()).square().sum() >= 0.99 * energy * rows.square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "max_rank"), [(60, None), (SKETCHED, 64)])
def test_domains_share_directions_and_fill_the_layer(n, max_rank, dtype):
    """Directions of earlier domains count as explained, and each domain brings its share of new ones."""
    param = weight(40, n, dtype)
    memory = SubspaceMemory([("w", param)], max_rank=max_rank, energy=0.97)
    oracle = Oracle(n, 0.97, max_rank)
    directions = orthogonal(n)
    for domain in range(5):
        # Each domain shares half of its directions with the one before.
        turned = directions.roll(-8 * domain, 1)
        seen = gradients(with_gap(n, 16), 40, steps=4, seed=domain, directions=turned)
        observe_all(memory, param, seen)
        added = memory.consolidate()["w"]
        assert abs(added - oracle.learn(seen)) <= 1
        basis = memory.basis("w")
        assert basis.dtype == dtype
        assert (basis.mT @ basis - torch.eye(basis.shape[1])).abs().max() <= 1e-5
        assert largest_angle(basis, oracle.basis) <= 1e-2
    assert memory.rank("w") > 45
    assert memory.domains == 5


def test_a_known_domain_adds_nothing():
    seen = gradients(with_gap(EXACT, 12), 64, steps=3)
    param = weight(64, EXACT)
    memory = SubspaceMemory([("w", param)], energy=0.95)
    for expected in (True, False):
        observe_all(memory, param, seen)
        assert (memory.consolidate()["w"] > 0) == expected


@pytest.mark.parametrize("max_rank", [None, 20])
@pytest.mark.parametrize("n", [EXACT, SKETCHED])
def test_memory_does_not_grow_with_steps(n, max_rank):
    param = weight(16, n)
    memory = SubspaceMemory([("w", param)], max_rank=max_rank)
    sizes = set()
    for gradient in gradients(with_gap(n, 8), 16, steps=6):
        observe_all(memory, param, [gradient])
        sizes.add(memory.nbytes())
    sketched = n > 1024 and max_rank is not None
    columns = 20 + 8 if sketched else n
    assert sizes == {4 * n * columns * (2 if sketched else 1) + (16 if sketched else 8)}
    memory.consolidate()
    assert memory.nbytes() == 4 * (n + 1) * memory.rank("w")


@pytest.mark.parametrize(
    ("n", "max_rank", "most"), [(EXACT, 5, 5), (EXACT, "auto", 24), (40, "auto", 16), (8, "auto", 8)]
)
def test_the_cap_is_for_all_domains(n, max_rank, most):
    param = weight(64, n)
    memory = SubspaceMemory([("w", param)], max_rank=max_rank, energy=1.0)
    for domain in range(3):
        observe_all(memory, param, gradients(torch.ones(n, dtype=torch.float64), 64, 2, seed=domain))
        assert memory.consolidate() == {"w": 0 if domain else most}
    assert memory.rank("w") == most
    assert SubspaceMemory([("w", weight(1, 20_000))], max_rank="auto").settings.most(20_000) == 256


@given(data=st.data())
def test_any_layer_fills_up_and_no_further(data):
    n, rows = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 6))
    energy = data.draw(st.sampled_from([0.3, 0.9, 1.0]))
    param = weight(rows, n)
    memory = SubspaceMemory([("w", param)], energy=energy)
    for domain in range(4):
        before = memory.rank("w")
        observe_all(memory, param, gradients(torch.ones(n, dtype=torch.float64), rows, 1, seed=domain))
        share = memory.surviving()["w"]
        added = memory.consolidate()["w"]
        used = memory.rank("w")
        assert used == before + added <= n
        assert memory.capacity()["w"] == {"width": n, "used": used, "free": n - used}
        basis = memory.basis("w")
        assert basis.shape == (n, used)
        assert torch.allclose(basis.mT @ basis, torch.eye(used), atol=1e-5)
        assert memory.surviving()["w"] <= min(share, 1 - energy) + 1e-5


def test_inputs_of_a_layer_are_what_passes_through_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, 4)).double()
    memory = SubspaceMemory(model, energy=0.9, source="inputs")
    batches = [torch.randn(6, 5, 10, dtype=torch.float64) * torch.arange(1, 11) for _ in range(3)]
    keep = torch.rand(6, 5) < 0.5
    for batch in batches:
        with torch.no_grad(), memory.watch(tokens=keep):
            model(batch)
        memory.observe()
        model(batch)  # not watched
    memory.consolidate()
    rows = torch.cat([batch[keep] for batch in batches])
    for name, seen in (("0.weight", rows), ("2.weight", model[1](model[0](rows)).detach())):
        oracle = Oracle(seen.shape[1], 0.9)
        oracle.learn([seen])
        assert memory.rank(name) == oracle.basis.shape[1] > 0
        assert largest_angle(memory.basis(name), oracle.basis) <= 1e-6


def test_gradients_lie_in_what_the_inputs_span():
    """Why protecting input directions protects the function: rows of dL/dW are sums of inputs."""
    torch.manual_seed(0)
    model = nn.Linear(20, 7, bias=False)
    inputs = torch.randn(8, 3) @ torch.randn(3, 20)
    memory = SubspaceMemory(model, energy=1.0, source="inputs")
    with memory.watch():
        model(inputs).square().sum().backward()
    memory.observe()
    memory.consolidate()
    assert memory.rank(model.weight) == 3
    assert memory.surviving()["weight"] <= 1e-6


def test_weights_of_linear_layers_are_tracked_once_and_embeddings_known():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.first, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            self.again = nn.Linear(4, 4)
            self.again.weight = self.first.weight
            self.norm = nn.LayerNorm(4)
            self.head.weight = self.embedding.weight

    model = Tied()
    memory = SubspaceMemory(model)
    assert memory.names == ["first.weight", "embedding.weight"]
    assert memory.embeddings == ["embedding.weight"]
    assert memory.is_embedding(model.head.weight) and memory.tracks(model.head.weight)
    assert memory.tracks(model.again.weight)
    assert SubspaceMemory(model.named_parameters()).names == ["embedding.weight", "first.weight"]


def test_leak_is_the_share_inside_the_basis():
    basis = orthogonal(12)[:, :5]
    memory = SubspaceMemory([("w", weight(6, 12)), ("v", weight(6, 12))])
    memory._layers["w"].subspace = Subspace(basis.float())
    for inside in (0.0, 0.25, 1.0):
        along, across = torch.randn(6, 5).double() @ basis.mT, torch.randn(6, 7).double() @ orthogonal(12)[:, 5:].mT
        change = along / along.norm() * inside**0.5 + across / across.norm() * (1 - inside) ** 0.5
        before = {"w": torch.zeros(6, 12), "v": torch.zeros(6, 12)}
        leak = memory.leak(before, {"w": change.float(), "v": torch.ones(6, 12)})
        assert leak["w"] == pytest.approx(inside, abs=1e-6)
        assert leak["v"] == 0.0
    assert memory.leak(before, before) == {"w": 0.0, "v": 0.0}


@pytest.mark.parametrize("stage", ["observed", "consolidated", "both"])
@pytest.mark.parametrize(("n", "max_rank"), [(EXACT, None), (SKETCHED, 24)])
def test_a_saved_memory_goes_on_as_if_it_had_not_been(tmp_path, n, max_rank, stage):
    seen = gradients(with_gap(n, 16), 48, steps=4)
    more = gradients(with_gap(n, 16), 48, steps=4, seed=7)
    param = weight(48, n)
    memory = SubspaceMemory([("w", param)], max_rank=max_rank, energy=0.9, seed=3)
    if stage != "observed":
        observe_all(memory, param, seen)
        memory.consolidate()
    if stage != "consolidated":
        observe_all(memory, param, more[:2])
    memory.save(tmp_path / "memory.safetensors")
    other = weight(48, n)
    loaded = SubspaceMemory.load(tmp_path / "memory.safetensors", [("w", other)])
    assert (loaded.domains, loaded.rank("w")) == (memory.domains, memory.rank("w"))
    for one, its in ((memory, param), (loaded, other)):
        observe_all(one, its, more[2:])
        one.consolidate()
    assert torch.equal(memory.basis("w"), loaded.basis("w"))
    assert loaded.capacity() == memory.capacity()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_of_the_memory_not_of_the_model(copied):
    model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(1000, 100))
    model[0].weight.grad = torch.randn(8, 8)
    memory = SubspaceMemory(model, energy=0.9)
    memory.observe()
    memory.consolidate()
    twin = copied(memory)
    assert torch.equal(twin.basis("0.weight"), memory.basis("0.weight"))
    assert twin.embeddings == memory.embeddings
    assert not twin._layers["0.weight"].modules


def test_the_same_seed_gives_the_same_bits():
    seen = gradients(with_gap(SKETCHED, 16), 48, steps=2)
    bases = [remember(SKETCHED, seen, 48, max_rank=24, seed=seed).basis("w") for seed in (1, 1, 2)]
    assert torch.equal(bases[0], bases[1])
    assert not torch.equal(bases[0], bases[2])


def test_layers_in_a_batch_are_as_layers_alone():
    """The last batch holds layers of two, one and no domains."""
    params = [weight(32, 26) for _ in range(3)]
    together = SubspaceMemory([(f"w{i}", p) for i, p in enumerate(params)], energy=0.9)
    singles = [weight(32, 26) for _ in params]
    alone = [SubspaceMemory([("w", p)], energy=0.9) for p in singles]
    for domain in range(3):
        for i, param in enumerate(params[: domain + 1]):
            (gradient,) = gradients(with_gap(26, 16), 32, 1, seed=10 * domain + i)
            param.grad = gradient.float()
            observe_all(alone[i], singles[i], [gradient])
            alone[i].consolidate()
        together.observe()
        together.consolidate()
    for param, single in zip(params, alone, strict=True):
        assert largest_angle(together.basis(param), single.basis("w")) <= 1e-5
        assert together.rank(param) == single.rank("w") > 0


def test_an_expert_that_no_token_is_sent_to_has_seen_nothing():
    experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    memory = SubspaceMemory(experts, source="inputs", max_rank=4)
    with torch.no_grad(), memory.watch():
        experts[0](torch.randn(6, 8))
        experts[1](torch.randn(0, 8))
    memory.observe()
    memory.consolidate()
    assert memory.has_seen(experts[0].weight) and not memory.has_seen(experts[1].weight)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_weights_that_a_pass_computes_are_not_tracked(norm):
    model = nn.Sequential(nn.Linear(8, 8), norm(nn.Linear(8, 8)))
    memory = SubspaceMemory(nn.Sequential(norm(nn.Embedding(8, 8)), model), source="inputs", max_rank=4)
    assert (memory.names, memory.embeddings) == (["1.0.weight"], [])


def test_to_be_bound_to_the_same_model_again_begins_no_domain():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    memory = SubspaceMemory(model, source="inputs", max_rank=4)
    before = memory.version
    memory.bind(model)
    assert memory.version == before
    memory.bind(copy.deepcopy(model))
    assert memory.version > before
