"""The chart against its formula in float64, its false alarms, and what it finds in streams of tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sparse_cl.probes.boundaries import BoundaryDetector, Cusum, threshold


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=30), st.integers(0, 5))
def test_the_chart_is_its_formula(scores, first):
    chart, high, low = Cusum(0.5), 0.0, 0.0
    first = min(first, len(scores))
    for score in scores[:first]:
        chart.calibrate(score)
    for number, score in enumerate(scores[first:], first):
        alarm = chart.update(score)
        before = torch.tensor(scores[:number], dtype=torch.float64)
        value = 0.0
        if number > 1 and before.std() > 1e-12:
            t = (score - before.mean()) / (before.std() * math.sqrt(1 + 1 / number))
            value = min(max(stats.norm.ppf(min(max(stats.t.cdf(t, number - 1), 1e-12), 1 - 1e-12)), -4), 4)
        elif number > 1:
            return  # all alike: rounding decides
        high, low = max(0.0, high + value - 0.5), max(0.0, low - value - 0.5)
        assert (chart._high, chart._low) == (pytest.approx(high, abs=1e-6), pytest.approx(low, abs=1e-6))
        assert alarm == (max(chart._high, chart._low) > chart.threshold)


@pytest.mark.parametrize("rate", [1e-1, 1e-2, 1e-3, 1e-4])
def test_the_threshold_is_that_of_the_mean_run(rate):
    """The run of a one-sided CUSUM, by its integral equation on a grid (Page 1954)."""
    h = threshold(rate)
    grid = (torch.arange(400, dtype=torch.float64) + 0.5) * h / 400
    normal = torch.distributions.Normal(0.0, 1.0)
    half = h / 800
    chances = normal.cdf(grid[None] + half - grid[:, None] + 0.5) - normal.cdf(grid[None] - half - grid[:, None] + 0.5)
    # From a point to below 0 is from there to 0, whose run is that of the first point, half a step away.
    chances[:, 0] += normal.cdf(-grid + 0.5)
    run = torch.linalg.solve(torch.eye(400, dtype=torch.float64) - chances, torch.ones(400, dtype=torch.float64))[0]
    assert float(run) * rate == pytest.approx(1, rel=0.06)


def test_false_alarms_of_normal_scores_are_as_many_as_were_asked_for():
    generator, alarms, rate = torch.Generator().manual_seed(0), 0, 1e-2
    for _ in range(40):
        chart = Cusum(rate)
        scores = (5 + 3 * torch.randn(520, generator=generator)).tolist()
        for score in scores[:20]:
            chart.calibrate(score)
        for score in scores[20:]:
            if chart.update(score):
                alarms += 1
                chart._high = chart._low = 0.0
    expected = 40 * 500 * rate
    assert 0.6 * expected < alarms < expected + 3 * expected**0.5


def batches(seed, count, spread, first=0):
    generator = torch.Generator().manual_seed(seed)
    chances = torch.rand(60, generator=generator) ** spread
    draws = torch.multinomial(chances, count * 256, replacement=True, generator=generator).view(count, 4, 64)
    return list(draws + first)


def test_a_new_domain_is_noticed_soon():
    late, false = [], 0
    for seed in range(20):
        detector = BoundaryDetector(1e-3)
        stream = batches(seed, 40, 2) + batches(100 + seed, 40, 2)
        found = [i for i, batch in enumerate(stream) if detector.update(batch)]
        # After a false alarm the new domain may fall into the batches that the detector learns from.
        near = [i for i in found if 40 - detector.warmup <= i <= 43]
        assert near, "no boundary is missed"
        late += [i - 40 for i in near if i >= 40]
        false += len(found) - len(near[-1:])
    assert max(late) <= 3
    assert len(late) >= 18
    assert false <= 3  # 20 streams of 48 batches that can be alarms, at 1 in 1,000


def test_it_warns_of_the_first_batch_of_a_new_domain_and_seldom_else():
    warned, quiet, missed = 0, 0, 0
    for seed in range(20):
        detector, before = BoundaryDetector(), False
        for number, batch in enumerate(batches(seed, 40, 2) + batches(100 + seed, 1, 2)):
            found = detector.update(batch)
            warns = found or detector.warns
            if number == 40:
                missed += not warns
            elif number >= detector.warmup:
                quiet, warned = quiet + 1, warned + (warns and not before)
            before = warns
    assert missed <= 1
    assert 0 < warned / quiet < 0.1


@pytest.mark.parametrize("length", [16, 40])  # right after the warm-up, and later
def test_start_says_how_far_back_the_new_domain_began(length):
    detector = BoundaryDetector(1e-3, 16)
    stream = batches(0, length, 2) + batches(1, 9, 2)
    found = [number for number, batch in enumerate(stream) if detector.update(batch)]
    assert len(found) == 1
    assert found[0] - detector.start == length


def test_one_domain_alone_and_a_gradual_change():
    detector = BoundaryDetector(1e-3)
    assert sum(detector.update(batch) for batch in batches(0, 2000, 2)) <= 6
    generator = torch.Generator().manual_seed(0)
    detector, found = BoundaryDetector(1e-3), []
    for i, (old, new) in enumerate(zip(batches(1, 300, 2), batches(2, 300, 2), strict=True)):
        mixed = torch.where(torch.rand(4, 1, generator=generator) < (i - 100) / 100, new, old)
        if detector.update(mixed):
            found.append(i)
    assert any(100 <= i <= 200 for i in found), "between all old and all new"


def test_a_stream_that_is_always_the_same_has_no_boundary():
    detector = BoundaryDetector(1e-3)
    assert not any(detector.update(torch.full((1, 50 + i % 3), 7)) for i in range(300))


def test_a_further_score_is_enough():
    generator, detector = torch.Generator().manual_seed(0), BoundaryDetector(1e-3)
    for number, batch in enumerate(batches(0, 60, 2)):
        shift = 2.0 if number >= 40 else 0.0
        if detector.update(batch, outside=0.1 + 0.02 * (shift + float(torch.randn(1, generator=generator)))):
            break
    assert 40 <= number < 50


def test_padding_does_not_count():
    first, second = BoundaryDetector(), BoundaryDetector()
    for number, batch in enumerate(batches(0, 30, 2) + batches(1, 5, 2)):
        mask = torch.ones_like(batch)
        mask[:, 40:] = 0
        found = first.update(batch[:, :40])
        assert found == second.update(batch.masked_fill(mask == 0, number), mask)


def test_it_goes_on_where_it_was():
    stream = batches(0, 30, 2) + batches(1, 20, 2)
    for stop in (5, 20, 40):
        whole, before, after = BoundaryDetector(), BoundaryDetector(), BoundaryDetector()
        expected = [whole.update(batch) for batch in stream]
        found = [before.update(batch) for batch in stream[:stop]]
        state = before.state_dict()
        later = [before.update(batch) for batch in stream[stop:]]
        after.load_state_dict(state)
        assert found + [after.update(batch) for batch in stream[stop:]] == found + later == expected
        assert not any(later) or after.start == before.start == whole.start
    assert any(expected)


def test_bad_input():
    for options, message in (
        ({"false_alarms": 0.0}, r"false_alarms: expected a rate a batch in \(0, 1\), got 0"),
        ({"false_alarms": 1.0}, "false_alarms: expected"),
        ({"warmup": 15}, "warmup: expected at least 16 batches, got 15"),
    ):
        with pytest.raises(ValueError, match=message):
            BoundaryDetector(**options)
    detector, ids = BoundaryDetector(), torch.ones(2, 3, dtype=torch.int64)
    detector.update(ids, outside=0.5)
    for arguments, scores, message in (
        ((ids, ids * 0), {"outside": 0.5}, "tokens: expected at least one that counts, got none"),
        ((ids,), {"outside": math.nan}, "outside: expected a finite score, got nan"),
        ((ids,), {}, r"scores: expected \['outside'\] as with the batches before, got \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            detector.update(*arguments, **scores)
