"""The study of streams: its intervals, and its mixtures."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binomtest

from benchmarks.arena import stream_energy, streams
from sparse_cl.probes.boundaries import BoundaryDetector


@pytest.mark.parametrize(("count", "total"), [(0, 60), (1, 60), (60, 60), (41, 57600)])
def test_intervals_are_exact(count, total):
    expected = binomtest(count, total).proportion_ci(method="exact")
    assert streams.interval(count, total) == [round(1000 * expected.low, 2), round(1000 * expected.high, 2)]


def test_alarms_in_a_mixture_are_counted_by_where_they_come(monkeypatch):
    seen = []

    class Cries(BoundaryDetector):
        """In the first domain alone, halfway through the mixture, and in the second domain."""

        def begin(self):
            self.number = 0

        def update(self, tokens, mask=None, **scores):
            seen.append(tokens)
            self.number += 1
            return self.number in (3, 46, 60)

    names = {"a": 1, "b": 2}
    monkeypatch.setattr(streams, "encode", lambda *given: {n: [{"input_ids": [x] * 8}] for n, x in names.items()})
    monkeypatch.setattr(streams, "BoundaryDetector", Cries)
    found = streams.gradual([], None, 4, 10, 3)
    assert (found["streams"], found["found"], found["false alarms before"], found["further alarms"]) == (6, 6, 6, 6)
    assert found["share of the new domain"] == [0.5] * 6
    first = torch.cat(seen[:70])
    assert first.shape == (70, 32)
    assert (first[:41] == 1).all() and (first[50:] == 2).all() and {1, 2} == set(first[41:50].flatten().tolist())


def test_energies_are_those_of_each_layers_inputs(tiny_llama):
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    width = tiny_llama.get_parameter(names[0]).shape[1]
    bases = {name: torch.linalg.qr(torch.randn(width, 3))[0] for name in names}
    ids, inputs = list(range(12)), []
    layers = [tiny_llama.get_submodule(name.removesuffix(".weight")) for name in names]
    handles = [layer.register_forward_pre_hook(lambda m, args: inputs.append(args[0][0].double())) for layer in layers]
    found = stream_energy.energies_of(tiny_llama, bases, ids)
    for handle in handles:
        handle.remove()
    for (whole, kept), x, basis in zip(found.tolist(), inputs, bases.values(), strict=True):
        assert whole == pytest.approx(float(x.square().sum()), rel=1e-5)
        assert kept == pytest.approx(float((x @ basis.double()).square().sum()), rel=1e-5)
    assert not layers[0]._forward_pre_hooks


def test_the_energy_alone_finds_what_moves_it():
    still, moves = torch.tensor([[10.0, 9.0]]), torch.tensor([[10.0, 5.0]])
    generator = torch.Generator().manual_seed(0)
    noise = [torch.cat([torch.zeros(1, 1), 0.1 * torch.rand(1, 1, generator=generator)], 1) for _ in range(64)]
    pool = {name: [([7], at + part) for part in noise] for name, at in (("a", still), ("b", moves))}
    by = {scores: stream_energy.study(pool, scores, 2, 0) for scores in ("tokens", "energy")}
    assert (by["energy"]["missed"], by["tokens"]["missed"]) == (0, 2)
    assert max(by["energy"]["delays"]) <= 3
