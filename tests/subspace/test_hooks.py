"""Which forward passes a memory of inputs notes, and what its hooks leave behind."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from sparse_cl import SubspaceMemory


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3))


def batches(count=4):
    rng = torch.Generator().manual_seed(1)
    return list(torch.randn(count, 8, 12, generator=rng) * torch.arange(1, 13))


def moments(memory):
    return {name: layer.moment.moment for name, layer in memory._layers.items()}


def test_a_training_loop_is_noted_without_more_ado():
    trained, watched = model(), model()
    loop = SubspaceMemory(trained, source="inputs")
    explicit = SubspaceMemory(watched, source="inputs")
    for x in batches():
        trained(x).square().mean().backward()
        with torch.no_grad():
            trained(torch.randn(8, 12))  # evaluation does not count
        loop.observe()
        with explicit.watch(), torch.no_grad():
            watched(x)
        explicit.observe()
    for name, moment in moments(loop).items():
        assert moment.any()
        assert torch.equal(moment, moments(explicit)[name])


def test_passes_before_the_first_watch_are_dropped_and_later_ones_do_not_count():
    net = model()
    memory = SubspaceMemory(net, source="inputs")
    first, second, third, _ = batches()
    net(first)
    with memory.watch():
        net(second)
    net(third)
    memory.observe()
    assert torch.allclose(moments(memory)["0.weight"], second.mT @ second)


@pytest.mark.parametrize("width", [12, 1100])
def test_passes_in_inference_mode_add_up_like_others(width):
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(9, width), nn.Linear(width, 3))
        memory = SubspaceMemory(net, source="inputs", max_rank=4)
        for seed in range(3):
            with memory.watch():
                for context in (mode, torch.no_grad):
                    with context():
                        net(torch.randint(0, 9, (5,), generator=torch.Generator().manual_seed(seed)))
            memory.observe()
        memory.consolidate()
        found.append(memory)
    ours, expected = found
    assert torch.equal(ours.used_rows("0.weight").values, expected.used_rows("0.weight").values)
    for tensor in ("basis", "values"):
        assert torch.equal(getattr(ours.subspace("1.weight"), tensor), getattr(expected.subspace("1.weight"), tensor))


def test_a_watch_inside_a_watch_leaves_it_watching():
    net = model()
    memory = SubspaceMemory(net, source="inputs")
    first, second, third, fourth = batches()
    with torch.no_grad(), memory.watch():
        net(first)
        with memory.watch(torch.arange(8) < 2):
            net(second)
        net(third)
    net(fourth)
    memory.observe()
    seen = torch.cat([first, second[:2], third])
    torch.testing.assert_close(moments(memory)["0.weight"], seen.mT @ seen)


def test_a_pass_that_breaks_off_is_dropped_whole():
    net = model()
    memory = SubspaceMemory(net, source="inputs")
    with pytest.raises(RuntimeError), memory.watch():
        net[2](net[0](batches()[0]))
        net(torch.randn(8, 13))
    with pytest.raises(ValueError, match="no forward pass was noted"):
        memory.observe()
    with memory.watch():
        net(batches()[1])
    memory.observe()
    assert torch.allclose(moments(memory)["0.weight"], batches()[1].mT @ batches()[1])


def test_layers_that_were_compiled_before_are_noted():
    net, x = model(), batches()[0]
    net[0].compile(backend="eager")
    with torch.no_grad():
        net(x)  # Dynamo compiles it without hooks, and does not look for them again
    memory = SubspaceMemory(net, source="inputs")
    with torch.no_grad(), memory.watch():
        net(x)
    memory.observe()
    assert torch.allclose(moments(memory)["0.weight"], x.mT @ x)


def test_hooks_go_with_the_memory_and_to_no_copy():
    net = model()
    memory = SubspaceMemory(net, source="inputs")
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        twin(batches()[0])
    assert not memory._observer.pending
    net(batches()[0])
    assert memory._observer.pending.keys() == {"0.weight", "2.weight"}
    del memory
    gc.collect()
    assert not any(layer._forward_pre_hooks for layer in net)


def test_binding_to_another_model_moves_the_hooks():
    first, second = model(), model()
    memory = SubspaceMemory(first, source="inputs")
    first(batches()[1])
    memory.bind(second)
    first(batches()[0])
    assert not memory._observer.pending
    second(batches()[0])
    memory.observe()
    assert torch.allclose(moments(memory)["0.weight"], batches()[0].mT @ batches()[0])


@pytest.mark.parametrize("max_rank", [None, 4])
def test_passes_under_autocast_and_with_a_keyword_are_noted_as_others(max_rank):
    torch.manual_seed(0)
    layer = nn.Linear(1500, 3)
    x = torch.randn(20, 2) @ torch.randn(2, 1500)
    found = []
    for autocast in (True, False):
        memory = SubspaceMemory(layer, source="inputs", max_rank=max_rank)
        for _ in range(2):  # the second time with a basis
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad(), memory.watch():
                layer(input=x)
            memory.observe()
            memory.consolidate()
        found.append(memory.basis("weight"))
    assert found[0].shape == (1500, 2)
    assert torch.equal(*found)
