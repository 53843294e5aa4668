"""The CUDA kernels' own source, compiled for the CPU by tests/cuda_emulation: their logic without a GPU."""

import shutil
from dataclasses import replace

import cases.clip_grad as cases
import pytest
import torch
from cases.adamw import FLOAT_GRADIENTS, SAME_DTYPES, Case, bits, make_problem
from cuda_emulation.emulated import Emulated, build

from sparse_cl import ops
from sparse_cl.layout import COLUMNS, DENSE, ELEMENTS, ROWS, TWO_FOUR

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="session")
def pair():
    library = build("clip_grad")
    return Emulated(ops.active_norm, library), Emulated(ops.scale_active_, library)


@pytest.mark.parametrize("options", cases.OPTIONS.values(), ids=cases.OPTIONS)
@pytest.mark.parametrize("dtype", SAME_DTYPES.values(), ids=SAME_DTYPES)
def test_active_entries_count_and_are_scaled(pair, dtype, options):
    launches = pair[0].launches
    cases.check(*pair, cases.all_cases(dtype, None, options))
    assert pair[0].launches == launches + 3  # sums of squares, their sum, products


@pytest.mark.parametrize("dtype", FLOAT_GRADIENTS.values(), ids=FLOAT_GRADIENTS)
def test_float32_gradients(pair, dtype):
    cases.check(*pair, cases.all_cases(dtype, torch.float32, {}))


def test_several_chunks(pair):
    """Rows that straddle chunks; words that are full, empty or in part there."""
    drawn = [
        Case(DENSE, (9001,)),
        Case(ROWS, (5, 3001), density=0.8),
        Case(ROWS, (9, 2048), density=0.8, dtype=torch.bfloat16),
        Case(ROWS, (6000, 1), density=0.9),
        Case(COLUMNS, (101, 100)),
        Case(COLUMNS, (2, 5001), density=0.9, dtype=torch.bfloat16),
        Case(ELEMENTS, (9001,), density=0.01),
        Case(ELEMENTS, (4, 2500), density=1.0, dtype=torch.bfloat16),
        Case(ELEMENTS, (100, 100), density=1e-3),
        Case(TWO_FOUR, (31, 400)),
    ]
    cases.check(*pair, drawn)


def test_gradients_of_all_dtypes_in_one_call(pair):
    launches = pair[0].launches
    drawn = [case for dtype in SAME_DTYPES.values() for case in cases.all_cases(dtype, None, {})]
    cases.check(*pair, [*cases.EMPTY, *drawn, *cases.EMPTY])
    assert pair[0].launches == launches + 2 * len(SAME_DTYPES) + 1


def test_tasks_past_one_launch(pair):
    drawn = [Case(kind, (3, 4)) for kind in (DENSE, ROWS, COLUMNS, ELEMENTS, TWO_FOUR) for _ in range(110)]
    launches = pair[0].launches
    cases.check(*pair, drawn)
    assert pair[0].launches == launches + 5


def test_nothing_is_active(pair):
    launches = pair[0].launches
    problem = cases.check(*pair, cases.EMPTY)
    assert pair[0](problem.grads, problem.states, cases.rows_of(problem)).item() == 0
    assert pair[0].launches == launches + 2  # the sum of no sums, twice


def test_a_factor_of_one_changes_no_bit(pair):
    for dtype in SAME_DTYPES.values():
        problem = make_problem(cases.all_cases(dtype, None, {}))
        for grad in problem.grads:
            grad.view(torch.uint8).copy_(torch.randint(256, grad.view(torch.uint8).shape, dtype=torch.uint8))
        before = problem.clone()
        for factor in (torch.tensor(1.0), torch.ones(1, dtype=torch.float64)):
            pair[1](problem.grads, problem.states, cases.rows_of(problem), factor)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(before.grads, problem.grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_moved_are_those_of_the_active_entries(pair, dtype):
    """Of the sectors that they lie in, each once."""
    drawn = [Case(DENSE, (96, 64)), Case(ROWS, (64, 128), density=0.25), Case(TWO_FOUR, (32, 64))]
    problem = make_problem([replace(case, dtype=dtype) for case in drawn])
    args = problem.grads, problem.states, cases.rows_of(problem)
    least = dtype.itemsize * (96 * 64 + 16 * 128 + 32 * 64)
    assert pair[0].bytes_moved(lambda: pair[0](*args)) == least
    assert pair[1].bytes_moved(lambda: pair[1](*args, torch.tensor(0.5))) == 2 * least
