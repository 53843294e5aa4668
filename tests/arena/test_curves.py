"""What is lost at equal learning, on curves that can be integrated by hand."""

from __future__ import annotations

import numpy as np
import pytest
from cases.runs import run
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.arena.compare import gather_runs
from benchmarks.arena.compare_report import to_text
from benchmarks.arena.curves import at_equal_learning, curve, gap, lines_over_rates


def rate(lr, learned, lost, seed=0, **other):
    """A run that learns the same of two domains, and loses a share of the first."""
    R = ((4.0, 4.0), (4.0 - learned, 4.0), (4.0 - learned + lost * learned, 4.0 - learned))
    return run(lr=lr, R=R, seed=seed, **other)


def test_the_gap_is_the_area_between_two_curves():
    straight = ([0.0, 1.0], [0.0, 1.0])
    assert gap(straight, ([0.0, 2.0], [0.5, 0.5])) == (pytest.approx(0.0), -0.5, 0.0, 1.0)
    bent = ([0.5, 0.75, 2.0], [0.0, 1.0, 1.0])
    area = 0.25 * 0.5 + 0.25 * 1.0 - 0.5 * 0.75
    assert gap(bent, straight) == (pytest.approx(area / 0.5), -0.5, 0.5, 1.0)
    assert gap(straight, ([1.5, 2.0], [0.0, 1.0])) is None
    assert gap(straight, ([0.25], [1.0])) == (-0.75, -0.75, 0.25, 0.25)
    assert gap(straight, ([], [])) is None


points = st.lists(st.tuples(st.floats(0, 1), st.floats(-1, 2)), min_size=2, max_size=6, unique_by=lambda p: p[0])


@given(points, points)
def test_the_gap_turns_round_and_agrees_with_a_fine_sum(one, other):
    one, other = (tuple(zip(*sorted(found), strict=True)) for found in (one, other))
    found = gap(one, other)
    if found is None:
        assert gap(other, one) is None
        return
    mean, least, low, high = found
    assert gap(other, one) == (pytest.approx(-mean), -least, low, high)
    assert least == np.interp(low, *one) - np.interp(low, *other)
    at = low + (np.arange(20_000) + 0.5) / 20_000 * (high - low)
    assert mean == pytest.approx(np.mean(np.interp(at, *one) - np.interp(at, *other)), abs=1e-3)


def test_a_curve_ends_where_most_is_learned():
    runs = [rate(1e-4, 0.5, 0.0), rate(1e-3, 1.0, 0.2), rate(1e-2, 0.75, 0.9)]
    (line,) = lines_over_rates(gather_runs(("here", run) for run in runs))
    learned, lost = curve(line, "a → b", 0)
    assert learned == pytest.approx([0.5, 1.0]) and lost == pytest.approx([0.0, 0.2])


def test_methods_are_compared_seed_by_seed():
    runs = []
    for seed, more in enumerate((0.1, 0.2, 0.3)):
        # The seeds differ from each other by far more than the methods do.
        runs += [rate(lr, learned, seed + learned, seed) for lr, learned in ((1e-3, 0.5), (1e-2, 1.5))]
        runs += [
            rate(lr, learned, seed + learned + more, seed, method="lora") for lr, learned in ((1e-3, 1.0), (1e-2, 2.0))
        ]
    compared = gather_runs(("here", run) for run in runs)
    (found,) = at_equal_learning(compared)
    assert (found.name, found.more.count) == ("lora", 3)
    assert found.more.mean == pytest.approx(0.2)
    assert found.more.half_width == pytest.approx(4.302652730 * 0.1 / 3**0.5)
    assert found.learned == pytest.approx((1.0, 1.5)) and found.most == pytest.approx(2.0)
    assert "20.0 ±24.8" in to_text(compared)
    assert at_equal_learning(gather_runs([("here", runs[0])])) == []


def test_bounds_and_what_learns_nothing_are_left_out():
    forgets_all = ((4.0, 4.0), (2.0, 4.0), (4.0, 2.0))
    runs = [run(method="single", lr=lr, R=forgets_all) for lr in (1e-3, 1e-2)]
    runs += [rate(1e-3, -0.5, 0.0), rate(1e-2, 1.0, 0.5), rate(1e-3, 0.5, 0.1, method="lora")]
    runs += [
        rate(1e-2, 1.0, 0.2, method="lora"),
        rate(1e-3, -1.0, 0.0, method="ewc"),
        rate(1e-2, -1.0, 0.0, method="ewc"),
    ]
    lora, ewc = at_equal_learning(gather_runs(("here", run) for run in runs))
    assert (lora.name, lora.most) == ("lora", pytest.approx(1.0))
    assert lora.more.mean == lora.least.mean == pytest.approx(-0.3), "where adamw has its one point"
    assert (ewc.more, ewc.learned, ewc.most) == (None, None, None)


def test_a_rate_that_one_seed_lacks_takes_no_other_seed_away():
    runs = [
        rate(lr, learned, learned, seed) for seed in (0, 1) for lr, learned in ((1e-3, 0.5), (3e-3, 1.0), (1e-2, 1.5))
    ]
    runs += [{**one, "method": "lora", "kind": "baseline"} for one in runs[1:]]
    (found,) = at_equal_learning(gather_runs(("here", run) for run in runs))
    assert found.more.count == 2 and found.more.mean == pytest.approx(0.0)
