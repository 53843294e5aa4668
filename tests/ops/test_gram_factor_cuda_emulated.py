"""gram_factor's CUDA kernel, compiled for the CPU by tests/cuda_emulation: its logic without a GPU."""

import shutil

import cases.gram_factor as cases
import pytest
import torch
from cuda_emulation.emulated import Emulated, build

from sparse_cl import ops

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="session")
def op():
    return Emulated(ops.gram_factor, build("gram_factor"))


@pytest.mark.parametrize("name", cases.CASES)
def test_columns_become_orthonormal(op, name):
    launches = op.launches
    cases.check(op, name)
    assert op.launches == launches + 1


def test_what_is_dependent(op):
    cases.check_what_is_dependent(op)


def test_columns_that_are_not_finite(op):
    cases.check_columns_that_are_not_finite(op)


def test_nearly_orthonormal_columns_keep_their_order(op):
    cases.check_order(op)


def test_an_empty_batch_launches_nothing(op):
    launches = op.launches
    factor, rank = op(torch.ones(0, 4, 4, dtype=torch.float64), torch.ones(0, 4, dtype=torch.float64), 1e-6)
    assert factor.shape == (0, 4, 4) and rank.shape == (0,)
    assert op.launches == launches
