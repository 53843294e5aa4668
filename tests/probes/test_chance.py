"""Laws of random overlaps against counting every set, and against drawing them."""

from itertools import combinations
from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.probes.chance import central_interval, common_to_all, hypergeometric, iou_of, mean_iou_interval


@given(st.data())
def test_the_law_of_two_sets_is_that_of_counting(data):
    width = data.draw(st.integers(1, 40))
    first, second = (data.draw(st.integers(0, width)) for _ in range(2))
    law = hypergeometric(width, first, second)
    expected = [
        comb(first, x) * comb(width - first, second - x) / comb(width, second) for x in range(min(first, second) + 1)
    ]
    assert law.tolist() == pytest.approx(expected, abs=1e-12)
    assert law.sum().item() == pytest.approx(1)


def test_the_law_holds_at_the_width_of_large_models():
    law = hypergeometric(14_336, 717, 717)
    x = torch.arange(718, dtype=torch.float64)
    assert law.sum().item() == pytest.approx(1, abs=1e-9)
    assert float(law @ x) == pytest.approx(717 * 717 / 14_336)


def test_several_sets_by_going_through_all():
    width, size, sets = 5, 2, 3
    choices = list(combinations(range(width), size))
    counts = [0] * (size + 1)
    for a in choices:
        for b in choices:
            for c in choices:
                counts[len({*a} & {*b} & {*c})] += 1
    assert common_to_all(width, size, sets).tolist() == pytest.approx([n / len(choices) ** 3 for n in counts])
    assert common_to_all(width, size, 1).tolist() == [0, 0, 1]
    assert common_to_all(704, 70, 2).tolist() == pytest.approx(hypergeometric(704, 70, 70).tolist(), abs=1e-12)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any))
def test_a_central_interval_leaves_at_most_its_tails_out_and_no_less_would_do(weights):
    law = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    low, high = central_interval(law, 0.8)
    assert law[:low].sum() <= 0.1 + 1e-9 and law[high + 1 :].sum() <= 0.1 + 1e-9
    assert law[: low + 1].sum() > 0.1 - 1e-9 and law[high:].sum() > 0.1 - 1e-9


@pytest.mark.parametrize("layers", [[(60, 6)], [(60, 6)] * 4, [(60, 3), (30, 15), (200, 10)]])
def test_the_interval_of_a_mean_over_layers_holds_ninety_five_of_a_hundred(layers):
    generator = torch.Generator().manual_seed(1)
    low, high = mean_iou_interval(layers, generator)
    drawn = torch.zeros(4000, dtype=torch.float64)
    for width, size in layers:
        a, b = (torch.rand(4000, width, generator=generator).argsort(1) < size for _ in range(2))
        drawn += iou_of((a & b).sum(1).double(), size) / len(layers)
    inside = ((drawn >= low - 1e-12) & (drawn <= high + 1e-12)).double().mean()
    assert inside >= 0.94
    if len(layers) > 1:
        assert inside <= 0.99
