from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.four_domains.metrics import FORMULAS, intransigence, of_separate_models, summarize

# Rows: base, after 1, after 2, after 3. Columns: domains 1, 2, 3.
R = [
    [0.1, 0.2, 0.3],
    [0.8, 0.3, 0.1],
    [0.5, 0.9, 0.4],
    [0.4, 0.6, 0.7],
]


def test_hand_computed_where_higher_is_better():
    summary = summarize(R)
    expected = {
        "acc": (0.4 + 0.6 + 0.7) / 3,
        "learning_accuracy": (0.8 + 0.9 + 0.7) / 3,
        "learned": (0.7 + 0.7 + 0.4) / 3,
        "forgetting": ((0.8 - 0.4) + (0.9 - 0.6)) / 2,
        "bwt": ((0.4 - 0.8) + (0.6 - 0.9)) / 2,
        "fwt": ((0.3 - 0.2) + (0.4 - 0.3)) / 2,
        "gain_lost": (0.4 + 0.3) / (0.7 + 0.7),
    }
    assert {**expected, "intransigence": None}.keys() == FORMULAS.keys()
    assert {name: summary[name] for name in expected} == pytest.approx(expected)
    assert summary["forgetting_by_domain"] == [pytest.approx(0.4), pytest.approx(0.3), None]
    assert summary["gain_lost_by_domain"] == [pytest.approx(0.4 / 0.7), pytest.approx(0.3 / 0.7), None]


def test_intransigence_compares_with_models_of_one_domain_each():
    single = [[0.1, 0.2, 0.3], [0.9, 0, 0], [0, 0.8, 0], [0, 0, 0.9]]
    alone = (0.9 - 0.8) + (0.8 - 0.9) + (0.9 - 0.7)
    assert summarize(R, single=single)["intransigence"] == pytest.approx(alone / 3)
    assert summarize(R, lower_is_better=True, single=single)["intransigence"] == pytest.approx(-alone / 3)
    assert summarize(R)["intransigence"] is None
    single[2][1] = None
    assert intransigence(R, single) == pytest.approx((0.1 + 0.2) / 2)
    with pytest.raises(ValueError, match="as many domains; got 3 and 1"):
        intransigence(R, [[0.1], [0.2]])


def test_hand_computed_bits_per_byte():
    bits = [[3.0, 2.0], [1.0, 2.5], [2.5, 0.5]]
    summary = summarize(bits, lower_is_better=True)
    assert summary["acc"] == 1.5
    assert summary["learning_accuracy"] == 0.75
    assert summary["forgetting"] == 1.5  # from 1.0 up to 2.5: worse, so positive
    assert summary["bwt"] == -1.5
    assert summary["fwt"] == -0.5  # from 2.0 up to 2.5 before it was learned
    assert summary["learned"] == 1.75
    assert summary["gain_lost"] == 0.75


def test_forgetting_counts_what_the_base_model_knew():
    assert summarize([[0.9, 0.0], [0.5, 0.0], [0.5, 1.0]])["forgetting"] == pytest.approx(0.4)
    assert summarize([[0.9, 0.0], [0.5, 0.0], [0.5, 1.0]])["bwt"] == 0


def test_domains_without_a_score_are_left_out():
    with_gap = [[None, *row] for row in R]
    with_gap.append([None, 0.4, 0.6, 0.7])
    shifted = summarize(with_gap)
    assert shifted["acc"] == pytest.approx((0.4 + 0.6 + 0.7) / 3)
    # Column 2 of the new matrix is learned in its row 2, so the diagonal is that of R, one row further down.
    assert shifted["learning_accuracy"] == pytest.approx((0.5 + 0.6 + 0.7) / 3)
    assert shifted["forgetting_by_domain"][0] is None


def test_one_domain_has_nothing_to_forget():
    summary = summarize([[0.2], [0.7]])
    assert (summary["acc"], summary["learned"]) == (0.7, pytest.approx(0.5))
    assert summary["forgetting"] is summary["bwt"] is summary["fwt"] is summary["gain_lost"] is None


@pytest.mark.parametrize("bad", [[], [[]], [[1.0]], [[1.0, 2.0], [1.0, 2.0]], [[1.0], [1.0, 2.0]]])
def test_a_matrix_of_another_shape_is_an_error(bad):
    with pytest.raises(ValueError, match=r"\(T\+1\) x T"):
        summarize(bad)


matrices = st.integers(1, 5).flatmap(
    lambda t: st.lists(
        st.lists(st.floats(-10, 10, allow_nan=False), min_size=t, max_size=t), min_size=t + 1, max_size=t + 1
    )
)


@given(matrices)
def test_both_senses_are_mirror_images(matrix):
    higher = summarize(matrix)
    lower = summarize([[-value for value in row] for row in matrix], lower_is_better=True)
    for name in ("learned", "forgetting", "bwt", "fwt"):
        assert higher[name] == (None if lower[name] is None else pytest.approx(lower[name]))
    assert higher["acc"] == pytest.approx(-lower["acc"])


@given(matrices)
def test_forgetting_is_never_less_than_the_loss_since_learning(matrix):
    summary = summarize(matrix)
    if summary["forgetting"] is not None:
        assert summary["forgetting"] >= -summary["bwt"] - 1e-9
        assert summary["acc"] == pytest.approx(
            summary["learning_accuracy"] + summary["bwt"] * (len(matrix) - 2) / (len(matrix) - 1), abs=1e-9
        )
    assert all(value is None or math.isfinite(value) for value in (summary[name] for name in FORMULAS))


@given(matrices)
def test_domains_that_are_scored_once_they_are_learned_have_the_same_numbers_but_fwt(matrix):
    below = [matrix[0], *([v if j < i else None for j, v in enumerate(row)] for i, row in enumerate(matrix[1:], 1))]
    whole, found = summarize(matrix), summarize(below)
    assert found["fwt"] is None
    for name in ("acc", "learning_accuracy", "learned", "bwt", "gain_lost"):
        assert found[name] == whole[name]
    # What was best before it was learned, but for the base, is not known.
    assert found["forgetting"] is None or found["forgetting"] <= whole["forgetting"]


def test_separate_models_forget_nothing():
    R = [[0.1, 0.2], [0.9, 0.0], [0.3, 0.8]]
    summary = of_separate_models(summarize(R))
    assert summary["acc"] == summary["learning_accuracy"] == pytest.approx(0.85)
    assert summary["learned"] == pytest.approx(0.7)
    assert [summary[name] for name in ("forgetting", "bwt", "fwt", "gain_lost")] == [None] * 4
    assert summary["forgetting_by_domain"] == summary["gain_lost_by_domain"] == [None, None]
