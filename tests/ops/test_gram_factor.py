"""gram_factor on the CPU: its promises, and native code against the reference."""

import cases.gram_factor as cases
import pytest
import torch
from cases.forked import exit_code
from cases.threads import threads
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl import build_info, ops, reference

both = pytest.mark.parametrize("op", [ops.gram_factor, reference.gram_factor], ids=["native", "reference"])


@both
@pytest.mark.parametrize("name", cases.CASES)
def test_columns_become_orthonormal(op, name):
    cases.check(op, name)


@both
def test_what_is_dependent(op):
    cases.check_what_is_dependent(op)


@both
def test_columns_that_are_not_finite(op):
    cases.check_columns_that_are_not_finite(op)


@both
def test_nearly_orthonormal_columns_keep_their_order(op):
    cases.check_order(op)


@both
@pytest.mark.parametrize("shape", [(0, 0), (3, 0, 0), (0, 4, 4), (2, 0, 5, 5)])
def test_nothing_to_factor(op, shape):
    factor, rank = op(torch.ones(shape, dtype=torch.float64), torch.ones(shape[:-1], dtype=torch.float64), 1e-6)
    assert factor.shape == shape
    assert rank.tolist() == torch.zeros(shape[:-2]).long().tolist()


@both
@given(
    data=st.data(),
    batch=st.integers(1, 4),
    k=st.integers(1, 40),
    rtol=st.sampled_from([0.0, 1e-9, 1e-5, 0.5]),
)
def test_any_rank_any_scale(op, data, batch, k, rtol):
    """Products of any rank, whose columns have any norm: finite, of at most that rank, orthonormal."""
    rank = data.draw(st.integers(0, k))
    exponents = torch.tensor(data.draw(st.lists(st.integers(-140, 140), min_size=k, max_size=k)), dtype=torch.float64)
    y = cases.gaussian(batch, 50, rank) @ cases.gaussian(batch, rank, k, seed=1) * 10**exponents
    gram, norms = cases.gram_of(y)
    factor, found = op(gram, norms, rtol)
    assert factor.isfinite().all()
    assert (found <= rank).all()
    if rtol < 0.5:
        assert (found == rank).all()
    assert cases.identity_error(factor, found, gram) < 1e-6


def test_a_batch_is_its_matrices_to_the_bit():
    y = cases.gaussian(5, 60, 33)
    y[2, :, 4] = y[2, :, 7]
    gram, norms = cases.gram_of(y)
    with threads(2):
        factor, rank = ops.gram_factor(gram, norms, 1e-6)
    for i in range(5):
        one, its_rank = ops.gram_factor(gram[i], norms[i], 1e-6)
        assert torch.equal(factor[i], one)
        assert rank[i] == its_rank


def test_strided_arguments():
    gram, norms = cases.gram_of(cases.gaussian(2, 30, 12))
    strided = torch.stack([gram, gram + 1], -1)[..., 0]
    norms_strided = torch.stack([norms, norms], -1)[..., 1]
    assert not strided.is_contiguous() and not norms_strided.is_contiguous()
    for mine, expected in zip(
        ops.gram_factor(strided, norms_strided, 1e-6), ops.gram_factor(gram, norms, 1e-6), strict=True
    ):
        assert torch.equal(mine, expected)


@both
@pytest.mark.parametrize(
    ("gram", "norms", "named"),
    [
        (torch.ones(2, 3).double(), torch.ones(2).double(), "gram: expected square"),
        (torch.ones(3).double(), torch.ones(3).double(), "gram: expected square"),
        (torch.ones(3, 3), torch.ones(3), "gram: expected square float64"),
        (torch.eye(3).double(), torch.ones(4).double(), "squared_norms: expected one float64 number a column"),
        (torch.eye(3).double(), torch.ones(3), "squared_norms: expected one float64 number a column"),
        (torch.ones(2, 3, 3).double(), torch.ones(3).double(), "squared_norms: expected one float64"),
    ],
)
def test_arguments_that_do_not_fit(op, gram, norms, named):
    with pytest.raises(RuntimeError, match=named):
        op(gram, norms, 1e-6)


def test_opcheck():
    for name in ("full", "batch", "duplicates", "zero"):
        torch.library.opcheck(ops.gram_factor, (*cases.gram_of(cases.CASES[name][0]), 1e-5))


def check_all(level):
    assert build_info()["cpu_level"] == level
    for name in cases.CASES:
        cases.check(ops.gram_factor, name)
    for check in (cases.check_what_is_dependent, cases.check_columns_that_are_not_finite, cases.check_order):
        check(ops.gram_factor)


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_lower_cpu_levels(level):
    """The native tests of this file again, on the code that older CPUs run."""
    levels = build_info()["cpu_levels"]
    if levels is None or level not in levels or level == build_info()["cpu_level"]:
        pytest.skip("not built, or what runs here anyway")
    assert exit_code(check_all, level, threads=2, SPARSE_CL_CPU_LEVEL=level) == 0
