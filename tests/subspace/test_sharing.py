"""Layers that read one tensor are observed once, with the result of observing each."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_cl import SubspaceMemory

WIDE = 1100
READERS = {"q": "x", "k": "x", "v": "x", "o": "y"}


class Attention(nn.Module):
    """q, k and v read one tensor, o another; `split` gives k a tensor of its own."""

    def __init__(self, n=12):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = nn.Linear(n, 6), nn.Linear(n, 6), nn.Linear(n, 6), nn.Linear(6, n)
        self.split = False

    def forward(self, x):
        return self.o(self.q(x) + self.k(2 * x if self.split else x) + self.v(x))


def pair(n=12, **settings):
    """A memory that shares and one that does not, each of a model of its own."""
    models = [Attention(n), Attention(n)]
    memories = [SubspaceMemory(m, source="inputs", share_inputs=i == 0, **settings) for i, m in enumerate(models)]
    return list(zip(models, memories, strict=True))


def observe(model, memory, *batches, tokens=None):
    for batch in batches:
        with torch.no_grad(), memory.watch(tokens):
            model(batch)
        memory.observe()


def inputs(count, n=12, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, 2, 5, n, generator=rng) * 0.7 ** torch.arange(n))


def assert_alike(ours, its, name):
    """One second moment: a product that is rounded otherwise may turn eigenvectors round, which says nothing."""
    found, expected = ((x.basis.double() * x.values.double()) @ x.basis.double().mT for x in (ours, its))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(its.values.sum()), msg=name)
    torch.testing.assert_close(torch.tensor([ours.outside, ours.mean]), torch.tensor([its.outside, its.mean]))


def assert_same(shared, single):
    assert shared.capacity() == single.capacity()
    for name in single.names:
        assert_alike(shared.subspace(name), single.subspace(name), name)


@pytest.mark.parametrize(("n", "max_rank"), [(12, None), (12, 4), (WIDE, 4)])
def test_the_result_is_that_of_observing_each(n, max_rank):
    keep = torch.rand(2, 5) < 0.7
    found = pair(n, max_rank=max_rank)
    for domain in range(3):
        for model, memory in found:
            observe(model, memory, *inputs(3, n, seed=domain), tokens=keep if domain else None)
            memory.consolidate(weight=1 + domain, fade=0.9)
        assert_same(found[0][1], found[1][1])
    shared, single = (memory for _, memory in found)
    assert shared.subspace("q.weight") is shared.subspace("k.weight") is shared.subspace("v.weight")
    assert shared.subspace("q.weight") is not shared.subspace("o.weight")
    assert shared.nbytes() < 0.7 * single.nbytes()


def test_a_training_loop_shares_too():
    found = pair()
    for model, memory in found:
        for x in inputs(3):
            model(x).square().sum().backward()
            memory.observe()
        assert (memory._layers["k.weight"].moment is None) == (memory is found[0][1])
        memory.consolidate()
    assert_same(found[0][1], found[1][1])


def test_readers_that_part_are_refused():
    model, memory = pair()[0]
    observe(model, memory, *inputs(1))
    model.split = True
    with pytest.raises(ValueError, match="k.weight read the inputs of q.weight until now, and others this time; build"):
        observe(model, memory, *inputs(1))
    # In the next domain they may part, and meet again in the one after.
    found = pair()
    for domain, split in enumerate([False, True, False]):
        for each, its in found:
            each.split = split
            observe(each, its, *inputs(2, seed=domain))
            its.consolidate(fade=0.5)
        assert_same(found[0][1], found[1][1])
    shared = found[0][1]
    assert shared.subspace("q.weight") is not shared.subspace("k.weight")


def test_a_reader_that_stays_away_is_refused():
    model, memory = pair()[0]
    observe(model, memory, *inputs(1))
    with torch.no_grad(), memory.watch():
        model(inputs(1)[0])
        model.q(inputs(1)[0])
    with pytest.raises(ValueError, match="q.weight read 2 inputs since the last call and k.weight 1, .*=False"):
        memory.observe()
    # Nothing of it was observed, and the domain goes on.
    observe(model, memory, *inputs(1, seed=1))
    assert float(memory._layers["q.weight"].moment.count) == 20


class Fork(nn.Module):
    """Layers whose inputs are, in any order, the same tensor, an equal one, or one that was changed in between."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 3) for _ in range(4))

    def forward(self, x, order):
        for layer, change in order:
            if change == "in place":
                x.mul_(1.5)
            elif change == "other":
                x = x.clone()
            self.layers[layer](x)


@given(
    passes=st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["same", "same", "in place", "other"])), max_size=6),
        min_size=1,
        max_size=3,
    ),
    split=st.booleans(),
)
def test_whatever_the_order_it_is_exact_or_refused(passes, split):
    found = []
    for share in (True, False):
        model = Fork()
        memory = SubspaceMemory(model, source="inputs", energy=1.0, share_inputs=share)
        try:
            for number, order in enumerate(passes):
                x = torch.randn(3, 4, generator=torch.Generator().manual_seed(number))
                with torch.no_grad(), memory.watch():
                    model(x, order)
                if split and order:
                    memory.observe()
            if not split and any(passes):
                memory.observe()
        except ValueError as error:
            assert share and "share_inputs=False" in str(error)
            return
        if any(passes):
            memory.consolidate()
        found.append(memory)
    shared, single = found
    for name in single.names:
        assert (shared.subspace(name) is None) == (single.subspace(name) is None)
        if single.subspace(name) is not None:
            assert_alike(shared.subspace(name), single.subspace(name), name)


def test_inference_tensors_are_shared_too():
    model, memory = pair()[0]
    with torch.inference_mode(), memory.watch():
        model(inputs(1)[0])
    memory.observe()
    assert memory._layers["v.weight"].source == "q.weight"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_tensor_that_was_written_between_two_readers_is_two(mode):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            read = self.a(x)
            return read + self.b(x.mul_(torch.arange(8) < 4))

    model = Gated()
    memory, (x,) = SubspaceMemory(model, source="inputs", energy=1.0), inputs(1, 8)
    with mode(), memory.watch():
        model(x.clone())
    memory.observe()
    for name, seen in (("a.weight", x), ("b.weight", x * (torch.arange(8) < 4))):
        rows = seen.flatten(0, 1)
        torch.testing.assert_close(memory._layers[name].moment.moment, rows.mT @ rows)


@pytest.mark.parametrize("n", [12, WIDE])
def test_a_memory_saved_in_the_middle_of_a_domain_goes_on_sharing(tmp_path, n):
    model, memory = pair(n, max_rank=4)[0]
    observe(model, memory, *inputs(2, n))
    memory.consolidate()
    observe(model, memory, *inputs(2, n, seed=1))
    memory.save(tmp_path / "memory.safetensors")
    loaded = SubspaceMemory.load(tmp_path / "memory.safetensors", model)
    twin = copy.deepcopy(memory)
    twin.bind(model)
    for each in (memory, loaded, twin):
        observe(model, each, *inputs(2, n, seed=2))
        assert each._layers["k.weight"].moment is None
        each.consolidate()
        assert each.subspace("q.weight") is each.subspace("k.weight")
        assert_same(each, memory)


def test_a_consolidation_that_fails_leaves_readers_together(monkeypatch):
    from sparse_cl.subspace import consolidation

    found = pair()
    for model, memory in found:
        observe(model, memory, *inputs(1))
        with monkeypatch.context() as patch:
            patch.setattr(consolidation, "leading", lambda *_: (_ for _ in ()).throw(torch.linalg.LinAlgError("no")))
            with pytest.raises(torch.linalg.LinAlgError):
                memory.consolidate()
        observe(model, memory, *inputs(1, seed=1))
        memory.consolidate()
    assert_same(found[0][1], found[1][1])


@pytest.mark.parametrize("fade", [1.0, 0.5])
@pytest.mark.parametrize("place", [torch.float64, "cuda"])
def test_what_moves_or_fades_together_stays_together(place, fade):
    if place == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model, memory = pair()[0]
    observe(model, memory, *inputs(2))
    memory.consolidate()
    if fade < 1:
        layer = memory._layers["o.weight"]
        layer.moment = memory._observer._new_moment(layer)
        layer.moment.add(torch.randn(4, 6))
        memory.consolidate(fade=fade)
    other = Attention().to(place)
    memory.bind(other)
    subspace = memory.subspace("q.weight")
    assert subspace is memory.subspace("k.weight") is memory.subspace("v.weight")
    for tensor in (subspace.basis, subspace.values):
        assert (tensor.dtype, tensor.device) == (other.q.weight.dtype, other.q.weight.device)
    observe(other, memory, *(x.to(place) for x in inputs(2, seed=1)))
    memory.consolidate()
    assert memory.subspace("q.weight") is memory.subspace("v.weight")


class Tied(nn.Module):
    """Two layers with one weight, each of which reads what another layer reads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gates = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))
        self.gates[1].weight = self.gates[0].weight

    def forward(self, x):
        for gate, up in zip(self.gates, self.ups, strict=True):
            x = gate(x).tanh() + up(x)
        return x


class Twice(nn.Module):
    """A layer that reads what another reads, and then something else."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.v = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return self.q(x) + self.v(x) + self.v(2 * x.roll(1, -1))


class Again(nn.Module):
    """One block in two places."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Attention(6)] * 2)
        self.last = nn.Linear(6, 6)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.last(x)


@pytest.mark.parametrize("kind", [Tied, Twice, Again])
@pytest.mark.parametrize("max_rank", [None, 3])
def test_a_weight_used_twice_counts_both_uses(kind, max_rank):
    found = []
    for share in (True, False):
        model = kind()
        memory = SubspaceMemory(model, source="inputs", max_rank=max_rank, share_inputs=share)
        for domain in range(2):
            observe(model, memory, *inputs(3, 6, seed=domain))
            memory.consolidate()
        found.append(memory)
    assert_same(*found)


def test_a_second_use_counts_like_the_first():
    model, batch = Twice(), inputs(1, 6)[0]
    memory = SubspaceMemory(model, source="inputs", energy=1.0)
    observe(model, memory, batch)
    memory.consolidate()
    rows = torch.cat([batch, 2 * batch.roll(1, -1)]).reshape(-1, 6).double()
    subspace = memory.subspace("v.weight")
    whole = (subspace.basis * subspace.values) @ subspace.basis.mT
    torch.testing.assert_close(whole.double(), rows.mT @ rows / len(rows), rtol=1e-4, atol=1e-5)
