"""The study of streams: its intervals, and its mixtures."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binomtest

from benchmarks.arena import streams
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
