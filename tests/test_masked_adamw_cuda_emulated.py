"""The CUDA kernel's own source, compiled for the CPU by tests/cuda_emulation: its logic without a GPU."""

import shutil

import pytest
import torch
from adamw_cases import (
    FLOAT_GRADIENTS,
    OPTIONS,
    SAME_DTYPES,
    Case,
    check_step,
    kinds,
    make_problem,
    same_random_bits,
)
from cuda_emulation.emulated import Emulated, build, run_sanitized

from sparse_cl import ops, reference
from sparse_cl.layout import DENSE, ELEMENTS, PER_ENTRY, PER_UNIT, ROWS, TWO_FOUR

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="session")
def op():
    return Emulated(ops.masked_adamw_, build("masked_adamw"))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", SAME_DTYPES.values(), ids=SAME_DTYPES)
def test_agrees_with_the_oracle_and_leaves_the_rest(op, dtype, options):
    cases = [case for master in (False, True) for case in kinds(dtype, master=master, **options)]
    launches = op.launches
    check_step(op, cases)
    assert op.launches == launches + 1


@pytest.mark.parametrize("dtype", FLOAT_GRADIENTS.values(), ids=FLOAT_GRADIENTS)
def test_float32_gradients(op, dtype):
    for options in (dict(amsgrad=True, master=True), dict(cohorts=3, scope=PER_ENTRY)):
        check_step(op, kinds(dtype, grad_dtype=torch.float32, **options), steps=2)


@pytest.mark.parametrize(
    "hyper",
    [
        dict(maximize=True),
        dict(weight_decay=0.0, eps=1e-3, beta1=0.0, beta2=0.5),
        dict(lr=9.0, lr_tensor=torch.tensor(0.01)),
        dict(lr=9.0, lr_tensor=torch.tensor([0.01]), grad_scale=torch.tensor(3.0), maximize=True),
        dict(grad_scale=torch.tensor([1024.0]), found_inf=torch.tensor([0.0])),
    ],
)
def test_hyperparameters(op, hyper):
    for dtype, master in [(torch.float32, False), (torch.bfloat16, True), (torch.float64, False)]:
        check_step(op, kinds(dtype, master=master), **hyper)


@pytest.mark.parametrize("found", [1.0, float("nan")])
def test_found_inf_changes_nothing(op, found):
    before = make_problem([*kinds(torch.bfloat16), *kinds(strided=True, cohorts=3, scope=PER_ENTRY)])
    after = before.clone()
    after.step(op, found_inf=torch.tensor(found))
    for old, new in zip([*before.params, *before.states], [*after.params, *after.states], strict=True):
        assert torch.equal(old, new)


def test_random_bits_are_the_reference_s(op):
    for dtype in (torch.bfloat16, torch.float16):
        for options in ({}, dict(cohorts=3, scope=PER_ENTRY), dict(cohorts=3, scope=PER_UNIT)):
            mine = make_problem(kinds(dtype, **options))
            plain = mine.clone()
            mine.step(op)
            plain.step(reference.masked_adamw_)
            assert min(same_random_bits(mine, plain, i) for i in range(len(mine.params))) > 0.995


def test_several_chunks_and_odd_densities(op):
    """More than one chunk a task, rows that straddle chunks, element blocks that are full, empty or in part there."""
    check_step(
        op,
        [
            Case(shape=(4099,)),
            Case(kind=ROWS, shape=(5, 3001), density=0.8),
            Case(kind=ROWS, shape=(9, 4096), density=0.8, dtype=torch.bfloat16, master=True),
            Case(kind=ROWS, shape=(6000, 1), density=0.9, gain=True, cohorts=255, scope=PER_UNIT),
            Case(kind=ELEMENTS, shape=(40961,), density=0.3),
            Case(kind=ELEMENTS, shape=(7, 2500), density=1.0, cohorts=16, scope=PER_ENTRY),
            Case(kind=ELEMENTS, shape=(300, 300), density=0.001),
            Case(kind=TWO_FOUR, shape=(3, 2004)),
        ],
        steps=3,
    )


def test_tasks_past_one_launch(op):
    cases = [Case(kind=kind, shape=(3, 4)) for kind in (DENSE, ROWS, ELEMENTS, TWO_FOUR) for _ in range(90)]
    launches = op.launches
    check_step(op, cases)
    assert op.launches == launches + 2


def test_parameters_without_active_entries(op):
    none = [Case(kind=kind, shape=(8, 12), density=0.0) for kind in (ROWS, ELEMENTS)] + [Case(shape=(0, 3))]
    launches = op.launches
    check_step(op, none)
    check_step(op, [])
    assert op.launches == launches
    check_step(op, [*none, Case(), *none])


def test_repeats_to_the_bit(op):
    problems = [make_problem(kinds(torch.bfloat16, cohorts=2, scope=PER_ENTRY)) for _ in range(2)]
    for problem in problems:
        problem.step(op)
    for first, second in zip(*(p.params + p.states for p in problems), strict=True):
        assert torch.equal(first, second)


def test_nan_and_inf_gradients_stay_with_their_entries(op):
    for case in kinds():
        problem = make_problem([case])
        where = problem.positions(0)[::3]
        problem.grads[0].view(-1)[where] = torch.tensor([float("nan"), float("inf")]).repeat(len(where))[: len(where)]
        before = problem.clone()
        problem.step(op)
        bad = problem.params[0].isnan().view(-1)
        assert bad[where].all() and bad.sum() == len(where)
        assert torch.equal(before.views(0)["step"] + 1, problem.views(0)["step"])


def test_addresses_and_undefined_behaviour():
    """A smaller run of this file with every access checked."""
    chosen = "several_chunks or float32_gradients or (oracle and plain and not fp64) or without_active"
    run_sanitized("masked_adamw", __file__, chosen)
