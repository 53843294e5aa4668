"""The CUDA kernel's own source, compiled for the CPU by tests/cuda_emulation: its logic without a GPU."""

import shutil

import pytest
import torch
from cases.adamw import (
    FLOAT_GRADIENTS,
    OPTIONS,
    SAME_DTYPES,
    Case,
    check_apply,
    check_skipped_update,
    check_step,
    check_two_halves,
    check_update,
    kinds,
    make_problem,
    same_random_bits,
)
from cuda_emulation.emulated import Emulated, build

from sparse_cl import ops, reference
from sparse_cl.layout import COLUMNS, DENSE, ELEMENTS, PER_ENTRY, PER_UNIT, ROWS, TWO_FOUR

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="session")
def op():
    return Emulated(ops.masked_adamw_, build("masked_adamw"))


@pytest.fixture(scope="session")
def apply():
    return Emulated(ops.apply_updates_, build("masked_adamw"))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", SAME_DTYPES.values(), ids=SAME_DTYPES)
def test_agrees_with_the_oracle_and_leaves_the_rest(op, dtype, options):
    cases = [case for master in (False, True) for case in kinds(dtype, master=master, **options)]
    launches = op.launches
    check_step(op, cases)
    assert op.launches == launches + (2 if options.get("by_row") else 1), "second moments of rows come first"


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
    cases = [Case(kind=kind, shape=(3, 4)) for kind in (DENSE, ROWS, ELEMENTS, TWO_FOUR) for _ in range(40)]
    launches = op.launches
    check_step(op, cases)
    assert op.launches == launches + 3, "160 tasks, 64 a launch"


@pytest.mark.parametrize("dtype", SAME_DTYPES.values(), ids=SAME_DTYPES)
def test_updates(op, apply, dtype):
    for options in ({}, dict(master=True, amsgrad=True), dict(cohorts=3, scope=PER_ENTRY, density=0.3)):
        check_update(op, kinds(dtype, **options))
        check_apply(apply, kinds(dtype, **options), seed=1)
        check_two_halves(op, apply, kinds(dtype, **options))
    check_skipped_update(op, kinds(dtype))


CLUSTERS = {
    "one corner": [(0, 3000)],
    "the end": [(190_000, 199_999)],
    "a gap of many blocks": [(5, 700), (150_001, 153_000)],
    "single entries": [(k, k + 1) for k in (0, 1023, 1024, 2047, 2048, 4095, 99_999, 199_998)],
    "whole": [(0, 199_999)],
}


@pytest.mark.parametrize("clusters", CLUSTERS.values(), ids=CLUSTERS)
def test_clustered_elements(op, clusters):
    """Chunks are of entries, so that a block's work does not depend on where they lie."""
    check_step(op, [Case(kind=ELEMENTS, shape=(199_999,), clusters=tuple(clusters))])


WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("master", [False, True], ids=["", "master"])
@pytest.mark.parametrize("dtype", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("kind", [DENSE, ROWS, TWO_FOUR], ids=["dense", "rows", "2:4"])
def test_moves_hardly_more_bytes_than_it_must(op, kind, dtype, master):
    """The least: each 32-byte sector that holds something active, once read and once written."""
    problem = make_problem([Case(kind=kind, shape=(32, 1024), dtype=dtype, master=master)])
    entries = problem.layouts[0].entries
    touched = 2 * entries if kind == TWO_FOUR else entries  # 2:4 leaves no sector out
    passes = 2 if master else 3  # the gradient, and the weight written; read where no master is
    state = 4 * (6 if master else 4) * entries
    index = {DENSE: 0, ROWS: 4 * 16, TWO_FOUR: 2 * entries / 8}[kind]
    least = passes * dtype.itemsize * touched + state + index
    moved = op.bytes_moved(lambda: problem.step(op))
    assert least <= moved <= 1.05 * least, f"{moved / entries:.1f} bytes an entry, {least / entries:.1f} at least"


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


@pytest.mark.parametrize("dtype", WEIGHTS.values(), ids=WEIGHTS)
def test_columns_of_an_active_layer_move_their_leaf_and_one_sector_of_the_weight(op, dtype):
    """Gradient, moments and master are packed. The weight lies by rows, so each entry is in a sector of its own."""
    case = Case(COLUMNS, (64, 1024), dtype, torch.float32, density=0.05, master=True, compact_grad=True)
    problem = make_problem([case])
    packed = (4 + 6 * 4) * problem.layouts[0].entries
    columns = problem.views(0)["columns"].long() * dtype.itemsize // 32
    sectors = 32 * 64 * columns.unique().numel()
    moved = op.bytes_moved(lambda: problem.step(op))
    assert packed + sectors <= moved <= 1.05 * (packed + 32 * problem.layouts[0].entries)
