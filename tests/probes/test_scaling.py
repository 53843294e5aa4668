from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.probes.scaling import fit_exponent

WIDTHS = [32, 32, 64, 64, 128, 256, 512]


@given(st.floats(-2, 2), st.floats(0.01, 10))
def test_a_power_is_found_exactly(exponent, factor):
    fitted, error = fit_exponent(WIDTHS, [factor * width**exponent for width in WIDTHS])
    assert fitted == pytest.approx(exponent, abs=1e-12)
    assert error < 1e-12


def test_the_error_is_that_of_regression_and_covers_as_it_says():
    draw, inside = np.random.default_rng(0), 0
    for number in range(400):
        values = [3 * width**-0.5 * np.exp(0.2 * draw.standard_normal()) for width in WIDTHS]
        fitted, error = fit_exponent(WIDTHS, values)
        inside += abs(fitted + 0.5) < 2.571 * error  # Student's 97.5 % point with 5 degrees of freedom
        if number == 0:
            (slope, _), covariance = np.polyfit(np.log(WIDTHS), np.log(values), 1, cov=True)
            assert (fitted, error) == pytest.approx((slope, covariance[0, 0] ** 0.5))
    assert 0.92 < inside / 400 < 0.98


@pytest.mark.parametrize(
    ("widths", "values", "message"),
    [
        ([1, 2], [1, 2], "three models"),
        ([2, 2, 2], [1, 2, 3], "two widths"),
        ([1, 2, 3], [1, 0, 3], "values: expected positive"),
        ([1, 2, 3], [1, 2], "one for each of the 3 widths"),
    ],
)
def test_what_gives_no_line_is_refused(widths, values, message):
    with pytest.raises(ValueError, match=message):
        fit_exponent(widths, values)
