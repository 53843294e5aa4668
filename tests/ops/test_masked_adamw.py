"""masked_adamw_ on the CPU: the native kernel against the reference and a float64 oracle, and what stays as it was."""

from dataclasses import replace

import pytest
import torch
from cases.adamw import (
    HYPER,
    OPTIONS,
    Case,
    bits,
    check_accuracy,
    check_step,
    check_untouched,
    kinds,
    make_problem,
    numbers,
    same_random_bits,
)
from cases.forked import exit_code
from cases.masked_adamw import DTYPES, EMPTY, LARGE, both, native, precisions, step_all
from cases.threads import threads

from sparse_cl import build_info, ops, reference
from sparse_cl.layout import COLUMNS, DENSE, ELEMENTS, PER_ENTRY, PER_UNIT, ROWS


@native
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype, grad_dtype, master", precisions())
def test_native_is_as_accurate_as_the_reference(dtype, grad_dtype, master, options):
    cases = kinds(dtype, grad_dtype=grad_dtype, master=master, **options)
    check_step(ops.masked_adamw_, cases, steps=3)


@native
@pytest.mark.parametrize("dtype, grad_dtype, master", precisions())
def test_large_parameters_are_split_between_threads(dtype, grad_dtype, master):
    cases = [replace(case, dtype=dtype, grad_dtype=grad_dtype, master=master) for case in LARGE]
    with threads(2):
        many = check_step(ops.masked_adamw_, cases, steps=3)
    with threads(1):
        one = make_problem(cases)
        for _ in range(3):
            one.step(ops.masked_adamw_)
    for a, b in zip(many.params + many.states, one.params + one.states, strict=True):
        assert torch.equal(bits(a), bits(b))


@native
@pytest.mark.parametrize(
    "hyper",
    [
        {"maximize": True},
        {"grad_scale": 1024.0},
        {"grad_scale": 3.0, "maximize": True},
        {"found_inf": 0.0, "grad_scale": 0.25},
        {"lr_tensor": 0.01, "lr": 1e9},
        {"weight_decay": 0.0},
        {"lr": 0.0},
        {"beta1": 0.0, "beta2": 0.0},
        {"beta1": 0.99, "beta2": 0.99999},
        {"eps": 1e-2},
    ],
    ids=lambda hyper: "-".join(hyper),
)
@pytest.mark.parametrize("dtype, grad_dtype, master", precisions())
def test_hyperparameters(dtype, grad_dtype, master, hyper):
    cases = kinds(dtype, grad_dtype=grad_dtype, master=master)
    cases += kinds(dtype, grad_dtype=grad_dtype, master=master, gain=True, scope=PER_UNIT, cohorts=2)
    tensors = {k: torch.tensor(hyper[k]) for k in ("lr_tensor", "grad_scale", "found_inf") if k in hyper}
    check_step(ops.masked_adamw_, cases, **{**hyper, **tensors})


@native
def test_parameters_of_all_dtypes_in_one_call():
    cases = [case for dtype, _ in DTYPES.values() for case in (*kinds(dtype), *EMPTY)]
    check_step(ops.masked_adamw_, cases, steps=2)


@native
def test_one_strided_and_one_contiguous():
    cases = [replace(case, shape=(24, 64)) for case in kinds() if len(case.shape) == 2]
    before = make_problem(cases)
    strided = make_problem([replace(case, strided=True) for case in cases])
    for number, part in enumerate(("params", "grads")):
        mine, expected = before.clone(), before.clone()
        setattr(mine, part, getattr(strided.clone(), part))
        assert not mine.params[0].is_contiguous() or number
        mine.step(ops.masked_adamw_)
        expected.step(ops.masked_adamw_)
        for a, b in zip(mine.params + mine.states, expected.params + expected.states, strict=True):
            assert torch.equal(a, b)


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_draws_the_bits_of_the_reference(dtype):
    cases = kinds(dtype, cohorts=4, scope=PER_ENTRY) + kinds(dtype)
    mine, plain = make_problem(cases), make_problem(cases)
    mine.step(ops.masked_adamw_)
    plain.step(reference.masked_adamw_)
    for i in range(len(cases)):
        assert same_random_bits(mine, plain, i) > 0.99


@both
@pytest.mark.parametrize("dtype, grad_dtype, master", precisions())
def test_frozen_bytes_stay_whatever_they_hold(op, dtype, grad_dtype, master):
    cases = [case for case in kinds(dtype, grad_dtype=grad_dtype, master=master) if case.kind != DENSE]
    cases += [replace(case, strided=True) for case in cases]
    problem = make_problem(cases)
    for i, (param, grad) in enumerate(zip(problem.params, problem.grads, strict=True)):
        frozen = torch.ones(param.numel(), dtype=torch.bool)
        frozen[problem.positions(i)] = False
        garbage = torch.randint(256, (param.numel(), dtype.itemsize), dtype=torch.uint8).view(dtype).view(param.shape)
        garbage.view(-1)[:1] = torch.nan
        frozen = frozen.view(param.shape)
        param.copy_(torch.where(frozen, garbage, param))
        grad.masked_fill_(frozen, torch.nan)
    before = problem.clone()
    for _ in range(3):
        problem.step(op)
    check_untouched(before, problem, 3, cases)
    for i, param in enumerate(problem.params):
        active = param.reshape(-1)[problem.positions(i)]
        assert active.isfinite().all()
        assert (active != before.params[i].reshape(-1)[problem.positions(i)]).any()


def plant(t, values, every):
    """Writes the values into every so-manieth entry, over and over."""
    flat = t.view(-1)[::every]
    flat.copy_(torch.tensor(values, dtype=torch.float64).repeat(flat.numel() // len(values) + 1)[: flat.numel()])


@native
@pytest.mark.parametrize("weight_decay", [0.1, -0.002], ids=["shrink", "overflow"])
@pytest.mark.parametrize("moment", [{}, {"amsgrad": True}, {"by_row": True}], ids=["", "amsgrad", "by-row"])
@pytest.mark.parametrize("dtype, grad_dtype, master", precisions())
def test_special_values_go_where_the_reference_sends_them(dtype, grad_dtype, master, moment, weight_decay):
    inf, nan, largest = torch.inf, torch.nan, torch.finfo(dtype).max
    problem = make_problem(kinds(dtype, grad_dtype=grad_dtype, master=master, **moment))
    for i, param in enumerate(problem.params):
        views = problem.views(i)
        plant(problem.grads[i], [0.0, -0.0, inf, 1e-45, -inf, 1e-30, nan, 1e-20, 1e20, -3e38, 1e-7], every=3)
        plant(views["exp_avg_sq"], [0.0, 1e-40, 1e38, 0.0], every=5)
        plant(views["exp_avg"], [0.0, -1e30], every=5)
        for value in (param, views["master"]) if master else (param,):
            plant(value, [largest, -largest, inf, -inf, nan, 0.0, 1e-40, 3e-8], every=7)
        if master:
            # Rounding this to nearest as if it were a number would carry into the sign.
            views["master"].view(-1)[:64:9].copy_(torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32))
    plain = problem.clone()
    for _ in range(3):
        problem.step(ops.masked_adamw_, weight_decay=weight_decay)
        plain.step(reference.masked_adamw_, weight_decay=weight_decay)
    for i in range(len(problem.params)):
        for name, expected in numbers(plain, i).items():
            narrow = expected.dtype.itemsize == 2
            tolerance = {"rtol": 4 * torch.finfo(expected.dtype).eps if narrow else 1e-5, "atol": 1e-7}
            got = numbers(problem, i)[name]
            torch.testing.assert_close(got, expected, equal_nan=True, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@both
def test_found_inf_changes_nothing(op):
    cases = [*kinds(), *kinds(torch.bfloat16, master=True), *kinds(torch.float16, amsgrad=True)]
    problem = make_problem(cases)
    before = problem.clone()
    for grad in problem.grads:
        grad.fill_(torch.inf)
    problem.step(op, found_inf=torch.tensor(1.0), grad_scale=torch.tensor(2.0))
    for a, b in zip(problem.params + problem.states, before.params + before.states, strict=True):
        assert torch.equal(bits(a), bits(b))


@both
def test_nothing_to_step_is_legal(op):
    problem = make_problem(EMPTY)
    before = problem.clone()
    problem.step(op)
    check_untouched(before, problem, 1)
    make_problem([]).step(op)


def test_opcheck():
    tensors = {k: torch.tensor(1.0) for k in ("lr_tensor", "grad_scale", "found_inf")}
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    for hyper in ({}, tensors):
        for cases in (kinds(amsgrad=True), kinds(torch.bfloat16, master=True, grad_dtype=torch.float32), EMPTY):
            problem = make_problem(cases)
            hyper = {**HYPER, **hyper}
            args = (problem.params, problem.grads, problem.states, [], problem.rows, *hyper.values())
            torch.library.opcheck(ops.masked_adamw_, args, test_utils=tests)
    torch.library.opcheck(ops.masked_adamw_, args)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_without_a_graph_break(backend):
    cases = [Case(DENSE), Case(ROWS), Case(ELEMENTS, dtype=torch.bfloat16, master=True)]
    mine, expected = make_problem(cases), make_problem(cases)
    layout = torch.tensor([where.row() for where in mine.layouts])

    def step(params, grads, states):
        scaled = [2 * g for g in grads]
        ops.masked_adamw_(params, scaled, states, [], layout, *HYPER.values())
        return 2 * params[0]

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for _ in range(2):
        got = compiled(mine.params, mine.grads, mine.states)
        assert torch.equal(got, step(expected.params, expected.grads, expected.states))
    for a, b in zip(mine.params + mine.states, expected.params + expected.states, strict=True):
        assert torch.equal(a, b)


def save_steps(level, path):
    assert build_info()["cpu_level"] == level
    torch.save(step_all(), path)


@native
def test_every_cpu_level_is_as_accurate(tmp_path):
    levels = build_info()["cpu_levels"]
    exact = [level for level in levels[: levels.index(build_info()["cpu_level"]) + 1] if level != "avx512"]
    found = []
    for level in exact:
        assert exit_code(save_steps, level, tmp_path / level, threads=2, SPARSE_CL_CPU_LEVEL=level) == 0
        found.append(torch.load(tmp_path / level))
    # These round every operation alike: no estimates, no contraction.
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_reference_meets_its_own_float64_oracle():
    cases = [*kinds(amsgrad=True), *kinds(torch.bfloat16, master=True)]
    mine, oracle = make_problem(cases), make_problem(cases).in_float64()
    for _ in range(10):
        mine.step(reference.masked_adamw_)
        oracle.step(reference.masked_adamw_)
    for i in range(len(cases)):
        got, exact = (p.views(i)["exp_avg_sq"].double() for p in (mine, oracle))
        assert torch.allclose(got, exact, rtol=1e-5, atol=1e-12)
    check_accuracy(mine, mine, oracle, cases)


@both
@pytest.mark.parametrize("kind", [ROWS, COLUMNS])
@pytest.mark.parametrize("dtype, grad_dtype, master", precisions())
def test_a_compact_gradient_gives_the_bits_of_the_whole_one(op, kind, dtype, grad_dtype, master):
    options = {"dtype": dtype, "grad_dtype": grad_dtype, "master": master}
    whole = make_problem([Case(kind, shape, **options) for shape in ((64, 96), (41, 51))])
    compact = make_problem([Case(kind, shape, compact_grad=True, **options) for shape in ((64, 96), (41, 51))])
    for problem in (whole, compact):
        problem.step(op)
    for i in range(2):
        for name, value in numbers(whole, i).items():
            # The native kernel steps gathered float32 weights by other instructions than contiguous ones.
            rtol = 1e-5 if kind == COLUMNS and dtype == torch.float32 else 0
            assert torch.allclose(numbers(compact, i)[name], value, rtol=rtol, atol=0), name
