"""What a memory does not protect: frozen, or trained, and named once."""

import copy
import warnings

import pytest
import torch
from torch import nn

from sparse_cl import ElasticAdamW, SubspaceMemory, SubspaceProjectedAdamW, protect


class Scaled(nn.Linear):
    """A kind of linear layer that torch does not know."""

    def forward(self, x):
        return 2 * super().forward(x)


class Net(nn.Module):
    """A convolution, positions, a weight used without its layer, an idle layer, and two that are watched."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.positions = nn.Parameter(torch.randn(8, 4))
        self.direct, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)
        self.scaled, self.head = Scaled(8, 8), nn.Linear(32, 8)

    def forward(self, x):
        x = self.conv(x) + self.positions.mT
        x = x @ self.direct.weight.mT
        return self.head(self.scaled(x).tanh().flatten(1))


SEEN = {"scaled.weight", "head.weight"}
UNSEEN = {"conv.weight", "positions", "direct.weight"}


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def memory(net):
    memory = SubspaceMemory(net, energy=1.0, source="inputs")
    with torch.no_grad(), memory.watch():
        net(old())
    memory.observe()
    memory.consolidate()
    return memory


def old():
    return torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))


def trained(net, optimizer, steps=5):
    """The names of what has moved, and the warnings that came."""
    before = copy.deepcopy(dict(net.named_parameters()))
    generator = torch.Generator().manual_seed(2)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad()
            (net(torch.randn(16, 4, 8, generator=generator)) - 1).square().mean().backward()
            optimizer.step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    return moved, [str(w.message) for w in found if str(w.message).startswith("memory:")]


def test_the_memory_says_what_it_has_seen(net, memory):
    assert {name for name, p in net.named_parameters() if memory.has_seen(p)} == SEEN
    assert memory.tracks(net.direct.weight) and not memory.has_seen(net.direct.weight)


def test_frozen_it_moves_no_old_output(net, memory):
    before = net(old()).detach()
    optimizer = SubspaceProjectedAdamW(net.named_parameters(), lr=1e-2, memory=memory)
    moved, told = trained(net, optimizer)
    assert moved == SEEN
    assert len(told) == 1 and told[0].startswith("memory: 3 parameters of two or more dimensions are frozen")
    assert all(repr(name) in told[0] for name in UNSEEN) and "rest='train' trains them unprotected" in told[0]
    assert {*UNSEEN, "idle.weight"} <= set(optimizer.rest) and not SEEN & set(optimizer.rest)
    assert torch.allclose(net(old()), before, atol=1e-4)


@pytest.mark.parametrize("hook", [False, True])
def test_trained_it_is_named_once(net, memory, hook):
    if hook:
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
        protect(optimizer, memory, budget=0)
    else:
        optimizer = ElasticAdamW(net.named_parameters(), lr=1e-2, memory=memory, budget=0)
    moved, told = trained(net, optimizer)
    assert moved >= SEEN | UNSEEN
    assert len(told) == 1 and told[0].startswith(
        "memory: 3 parameters of two or more dimensions are trained unprotected"
    )
    assert told[0].endswith("rest='freeze' leaves them as they are") is not hook  # `protect` has no `rest`


@pytest.mark.parametrize("kind", [torch.optim.SGD, ElasticAdamW])
def test_what_another_optimizer_may_step_is_named_until_that_is_protected_too(net, memory, kind):
    def of(part):
        return kind([(name, p) for name, p in net.named_parameters() if name.startswith(part)], lr=1e-2)

    cover = ElasticAdamW.set_memory if kind is ElasticAdamW else protect
    one, two = of("scaled"), of("head")
    cover(one, memory)
    _, told = trained(net, one, steps=2)
    assert len(told) == 1 and told[0].startswith("memory: 1 weights that it knows have gradients and are not in this")
    assert "head.weight the first; another optimizer that steps them" in told[0]
    cover(two, memory)
    assert not trained(net, two, steps=2)[1]
    net.head.requires_grad_(False)
    net.zero_grad()
    cover(third := of("scaled"), memory)
    assert not trained(net, third, steps=2)[1]


def test_what_runs_for_the_first_time_later_is_named_then(net, memory):
    optimizer = ElasticAdamW(net.named_parameters(), lr=1e-2, memory=memory, budget=0)
    trained(net, optimizer)
    net.scaled = net.idle
    _, told = trained(net, optimizer)
    assert len(told) == 1 and "1 parameters of two or more dimensions are trained" in told[0] and "idle" in told[0]


def test_nothing_is_said_before_there_is_anything_to_protect(net):
    optimizer = SubspaceProjectedAdamW(net.named_parameters(), lr=1e-2, memory=SubspaceMemory(net, source="inputs"))
    moved, told = trained(net, optimizer)
    assert not told and moved >= SEEN | UNSEEN
