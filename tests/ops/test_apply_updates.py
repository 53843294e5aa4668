"""A step in two halves: ``masked_adamw_`` writes updates, ``apply_updates_`` adds them."""

import pytest
import torch
from cases.adamw import (
    FLOAT_GRADIENTS,
    OPTIONS,
    SAME_DTYPES,
    Case,
    bits,
    check_apply,
    check_skipped_update,
    check_two_halves,
    check_update,
    kinds,
    make_problem,
    numbers,
)

from sparse_cl import ops, reference
from sparse_cl.layout import DENSE, ELEMENTS, PER_ENTRY, ROWS

native = pytest.mark.skipif(not ops.LOADED["cpu"], reason="no native library was built")
both = pytest.mark.parametrize(
    ("op", "apply"),
    [
        pytest.param(ops.masked_adamw_, ops.apply_updates_, id="native", marks=native),
        pytest.param(reference.masked_adamw_, reference.apply_updates_, id="ref"),
    ],
)
EMPTY = [Case(kind=kind, shape=(8, 12), density=0.0) for kind in (ROWS, ELEMENTS)] + [Case(shape=(0, 3))]


def cases_of(dtype, **options):
    narrow = dtype.itemsize == 2
    return [
        case for master in ((False, True) if narrow else (False,)) for case in kinds(dtype, master=master, **options)
    ]


@native
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", SAME_DTYPES.values(), ids=SAME_DTYPES)
def test_updates_meet_the_oracle_and_are_applied(dtype, options):
    cases = [*cases_of(dtype, **options), *EMPTY]
    check_update(ops.masked_adamw_, cases, steps=2)
    check_apply(ops.apply_updates_, cases, seed=len(options) % 2)
    check_two_halves(ops.masked_adamw_, ops.apply_updates_, cases, steps=3 if dtype.itemsize > 2 else 1)


@pytest.mark.parametrize("dtype", SAME_DTYPES.values(), ids=SAME_DTYPES)
def test_the_reference_s_updates_are_its_step(dtype):
    for options in ({}, dict(cohorts=256, scope=PER_ENTRY, amsgrad=True), dict(compact_grad=True, gain=True)):
        cases = [*cases_of(dtype, **options), *EMPTY]
        check_update(reference.masked_adamw_, cases, steps=2)
        check_two_halves(reference.masked_adamw_, reference.apply_updates_, cases)


@both
@pytest.mark.parametrize("dtype", FLOAT_GRADIENTS.values(), ids=FLOAT_GRADIENTS)
def test_float32_gradients(op, apply, dtype):
    check_update(op, cases_of(dtype, grad_dtype=torch.float32, amsgrad=True))


@both
@pytest.mark.parametrize(
    "hyper",
    [
        dict(maximize=True),
        dict(weight_decay=0.0, eps=1e-3, beta1=0.0, beta2=0.5),
        dict(lr=9.0, lr_tensor=torch.tensor([0.01]), grad_scale=torch.tensor(3.0), maximize=True),
        dict(grad_scale=torch.tensor([1024.0]), found_inf=torch.tensor([0.0])),
    ],
)
def test_hyperparameters(op, apply, hyper):
    for dtype, master in [(torch.float32, False), (torch.bfloat16, True), (torch.float64, False)]:
        check_update(op, kinds(dtype, master=master), **hyper)


@both
@pytest.mark.parametrize("found", [1.0, torch.nan])
def test_a_skipped_step_has_no_update(op, apply, found):
    check_skipped_update(
        op, [*kinds(), *kinds(torch.bfloat16, master=True), *kinds(torch.float16), *EMPTY], found=found
    )


@both
def test_applied_updates_meet_the_oracle(op, apply):
    for case in [*kinds(), *kinds(torch.float64), *kinds(torch.bfloat16, master=True)]:
        mine = make_problem([case]).with_updates(seed=1)
        oracle = mine.in_float64()
        mine.apply(apply)
        oracle.apply(reference.apply_updates_)
        name = "master" if case.master else "param"
        got, exact = numbers(mine, 0)[name].double(), numbers(oracle, 0)[name]
        assert (got - exact).abs().max() <= torch.finfo(mine.layouts[0].dtype).eps * exact.abs().max()


@both
def test_rounding_is_unbiased(op, apply):
    """Updates of a hundredth of a unit in the last place add up all the same."""
    mine = make_problem([Case(shape=(64, 64), dtype=torch.bfloat16)]).with_updates(seed=1)
    mine.params[0].fill_(1.0)
    mine.updates[0].fill_(2**-7 / 100)
    for _ in range(200):
        mine.views(0)["step"].add_(1)
        mine.apply(apply)
    moved = mine.params[0].double() - 1
    assert moved.mean() == pytest.approx(200 * 2**-7 / 100, abs=6 * float(moved.std()) / 64)


def put(name, make):
    def spoil(problem):
        getattr(problem, name)[1] = make(getattr(problem, name)[1])

    return spoil


WRONG = {
    "an update is missing": (lambda problem: problem.updates.pop(), "updates"),
    "a compact update is whole": (
        put("updates", lambda t: torch.zeros(37, 40)),
        r"updates\[1\]: expected a contiguous",
    ),
    "a strided update": (put("updates", lambda t: torch.stack([t, t], -1)[..., 0]), r"updates\[1\]"),
    "an update of another dtype": (put("updates", lambda t: t.double()), r"updates\[1\]"),
    "a narrow update": (put("updates", lambda t: t.bfloat16()), r"updates\[1\]"),
    "a short state": (put("states", lambda t: t[:-4].clone()), r"states\[1\]"),
    "a state is missing": (lambda problem: problem.states.pop(), "states"),
    "a parameter of another shape": (put("params", lambda t: t[:, :3].contiguous()), r"\[1\]"),
    "an integer parameter": (put("params", lambda t: t.int()), r"params\[1\]"),
}


@both
@pytest.mark.parametrize("kind", [ROWS, ELEMENTS])
@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_malformed_calls_raise_and_change_nothing(op, apply, kind, spoil, message):
    problem = make_problem([Case(DENSE), Case(kind, cohorts=2, scope=PER_ENTRY)]).with_updates(seed=1)
    spoil(problem)
    before = [bits(t).clone() for t in problem.params + problem.states + problem.updates]
    with pytest.raises(RuntimeError, match=message):
        rows = torch.tensor([layout.row() for layout in problem.layouts])
        apply(problem.params, problem.states, problem.updates, rows, None)
    with pytest.raises(RuntimeError, match=message):
        problem.step(op)
    for old, new in zip(before, problem.params + problem.states + problem.updates, strict=True):
        assert torch.equal(old, bits(new))


@both
@pytest.mark.parametrize("missing", ["states", "updates"])
def test_a_list_that_is_too_short_is_named(op, apply, missing):
    """Not "grads", which the op has none of."""
    problem = make_problem([Case(), Case()]).with_updates(seed=1)
    getattr(problem, missing).pop()
    with pytest.raises(RuntimeError, match=r"apply_updates_: expected as many updates and states as params \(2\)"):
        apply(problem.params, problem.states, problem.updates, problem.rows, None)


def test_opcheck():
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    for cases in (kinds(amsgrad=True), kinds(torch.bfloat16, master=True), EMPTY):
        for found in (None, torch.tensor(0.0)):
            problem = make_problem(cases).with_updates(seed=1)
            args = (problem.params, problem.states, problem.updates, problem.rows, found)
            torch.library.opcheck(ops.apply_updates_, args, test_utils=tests)
