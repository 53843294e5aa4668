"""The op on the CPU: the native kernel against the reference and a float64 oracle, and what both refuse."""

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

from sparse_cl import build_info, ops, reference
from sparse_cl.layout import COLUMNS, DENSE, ELEMENTS, FIELDS, PER_ENTRY, PER_UNIT, ROWS, TWO_FOUR

native = pytest.mark.skipif(not ops.LOADED["cpu"], reason="no native library was built")
both = pytest.mark.parametrize(
    "op", [pytest.param(ops.masked_adamw_, id="native", marks=native), pytest.param(reference.masked_adamw_, id="ref")]
)

#: Storage types of parameter and gradient.
DTYPES = {
    "fp32": (torch.float32, None),
    "fp64": (torch.float64, None),
    "fp64-fp32": (torch.float64, torch.float32),
    "bf16": (torch.bfloat16, None),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, None),
    "fp16-fp32": (torch.float16, torch.float32),
}
LARGE = [
    Case(DENSE, (301, 400)),
    Case(DENSE, (70001,), cohorts=9, scope=PER_ENTRY),
    Case(ROWS, (400, 401)),
    Case(ROWS, (6, 9000), gain=True, cohorts=5, scope=PER_ENTRY),
    Case(ROWS, (90001,), density=0.9),
    Case(COLUMNS, (301, 401)),
    Case(COLUMNS, (20, 9001), gain=True, cohorts=3, scope=PER_UNIT),
    Case(COLUMNS, (301, 401), compact_grad=True),
    Case(ROWS, (400, 401), compact_grad=True),
    Case(ELEMENTS, (1333, 401)),
    Case(ELEMENTS, (333, 401), density=0.01, amsgrad=True),
    Case(ELEMENTS, (257, 401), density=1.0, cohorts=9, scope=PER_ENTRY),
    Case(TWO_FOUR, (301, 400)),
]
EMPTY = [
    Case(DENSE, (0,)),
    Case(DENSE, (0, 3)),
    Case(ROWS, (5, 0)),
    Case(ROWS, (5, 4), density=0.0),
    Case(COLUMNS, (0, 5)),
    Case(COLUMNS, (4, 5), density=0.0),
    Case(ELEMENTS, (0, 4)),
    Case(ELEMENTS, (40, 50), density=0.0),
    Case(TWO_FOUR, (0, 4)),
    Case(TWO_FOUR, (3, 0)),
]


def precisions():
    """(parameter dtype, gradient dtype, master) of all that the op takes."""
    plain = [pytest.param(*dtypes, False, id=name) for name, dtypes in DTYPES.items()]
    narrow = {name: dtypes for name, dtypes in DTYPES.items() if dtypes[0].itemsize == 2}
    return plain + [pytest.param(*dtypes, True, id=f"{name}-master") for name, dtypes in narrow.items()]


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
    many = check_step(ops.masked_adamw_, cases, steps=3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = make_problem(cases)
        for _ in range(3):
            one.step(ops.masked_adamw_)
    finally:
        torch.set_num_threads(threads)
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
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("dtype, grad_dtype, master", precisions())
def test_special_values_go_where_the_reference_sends_them(dtype, grad_dtype, master, amsgrad, weight_decay):
    inf, nan, largest = torch.inf, torch.nan, torch.finfo(dtype).max
    problem = make_problem(kinds(dtype, grad_dtype=grad_dtype, master=master, amsgrad=amsgrad))
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


def step_all():
    """Checks parameters of all kinds and precisions; returns the bytes that the op leaves."""
    result = []
    for dtype, grad_dtype in DTYPES.values():
        for master in (False, True) if dtype.itemsize == 2 else (False,):
            common = dict(grad_dtype=grad_dtype, master=master)
            cases = kinds(dtype, **common) + (LARGE if dtype == torch.float32 else [])
            cases += kinds(dtype, amsgrad=True, cohorts=3, scope=PER_ENTRY, **common)
            cases += kinds(dtype, gain=True, cohorts=3, scope=PER_UNIT, **common)
            problem = check_step(ops.masked_adamw_, cases, grad_scale=torch.tensor(3.0))
            result += [bits(t) for t in problem.params + problem.states]
    return result


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


def malformed():
    """Ways to spoil the second of two parameters, each with what the message must say."""

    def field(name, value):
        def spoil(args):
            args["layout"][1][FIELDS.index(name)] = value

        return spoil

    def put(part, make):
        def spoil(args):
            args[part][1] = make(args[part][1])

        return spoil

    def scalar(name, value):
        return lambda args: args.__setitem__(name, value)

    return {
        "a gradient is missing": (lambda args: args["grads"].pop(), "as many grads and states as params"),
        "a state is missing": (lambda args: args["states"].pop(), "as many grads and states as params"),
        "a row of the layout is missing": (scalar("layout", torch.zeros(1, len(FIELDS), dtype=torch.long)), "layout"),
        "a column of the layout is missing": (lambda args: scalar("layout", args["layout"][:, 1:])(args), "layout"),
        "layout of floats": (lambda args: scalar("layout", args["layout"].double())(args), "layout"),
        "unknown kind": (field("kind", 5), "layout.1."),
        "negative kind": (field("kind", -1), "layout.1."),
        "unknown scope": (field("cohort_scope", 3), "layout.1."),
        "no cohort": (field("cohorts", 0), "layout.1."),
        "too many cohorts": (field("cohorts", 257), "layout.1."),
        "cohorts that wrap to one": (field("cohorts", 65537), "layout.1."),
        "a gradient that is neither compact nor not": (field("compact_grad", 2), r"\[1\]"),
        "a gradient that should be compact": (field("compact_grad", 1), r"\[1\]"),
        "more units than there are": (field("units", 37 * 40 + 1), "layout.1."),
        "negative units": (field("units", -1), "layout.1."),
        "moments past the end": (field("exp_avg_sq_offset", 1 << 20), r"\[1\]"),
        "moments nowhere": (field("exp_avg_offset", 0), r"\[1\]"),
        "moments not aligned": (field("exp_avg_offset", 260), r"\[1\]"),
        "fewer columns than the state is for": (lambda args: narrow(args, slice(None), slice(39)), r"\[1\]"),
        "fewer rows than the state is for": (lambda args: narrow(args, slice(20), slice(None)), r"\[1\]"),
        "another shape of as many elements": (lambda args: reshape(args, (40, 37)), r"\[1\]"),
        "short state": (put("states", lambda t: t[:-4].clone()), r"states\[1\]"),
        "long state": (put("states", lambda t: torch.cat([t, t])), r"states\[1\]"),
        "empty state": (put("states", lambda t: t[:0]), r"states\[1\]"),
        "state of floats": (put("states", lambda t: t.view(torch.float32)), r"states\[1\]"),
        "strided state": (put("states", lambda t: torch.stack([t, t], 1)[:, 0]), r"states\[1\]"),
        "gradient of another shape": (put("grads", lambda t: t[:, :1]), r"grads\[1\]"),
        "gradient of one dimension": (put("grads", lambda t: t.view(-1)), r"grads\[1\]"),
        "narrow gradient": (put("grads", lambda t: t.bfloat16()), r"grads\[1\]"),
        "wide gradient": (put("grads", lambda t: t.double()), r"grads\[1\]"),
        "integer parameter": (lambda args: both_as(args, torch.int32), r"params\[1\]"),
        "parameter of another dtype": (lambda args: both_as(args, torch.float64), r"\[1\]"),
        "two learning rates": (scalar("lr_tensor", torch.ones(2)), "lr_tensor"),
        "float64 scale": (scalar("grad_scale", torch.ones((), dtype=torch.float64)), "grad_scale"),
        "integer found_inf": (scalar("found_inf", torch.ones((), dtype=torch.int32)), "found_inf"),
    }


def narrow(args, *index):
    for part in ("params", "grads"):
        args[part][1] = args[part][1][index].contiguous()


def reshape(args, shape):
    for part in ("params", "grads"):
        args[part][1] = args[part][1].view(shape)


def both_as(args, dtype):
    for part in ("params", "grads"):
        args[part][1] = args[part][1].to(dtype)


@both
@pytest.mark.parametrize("kind", [ROWS, ELEMENTS])
@pytest.mark.parametrize("spoil, message", malformed().values(), ids=malformed())
def test_malformed_calls_raise_and_change_nothing(op, kind, spoil, message):
    problem = make_problem([Case(DENSE), Case(kind, cohorts=2, scope=PER_ENTRY)])
    layout = torch.tensor([where.row() for where in problem.layouts])
    tensors = {"params": problem.params, "grads": problem.grads, "states": problem.states, "updates": []}
    args = {**tensors, "layout": layout, **HYPER}
    spoil(args)
    before = [bits(t).clone() for t in args["params"] + args["states"]]
    with pytest.raises(RuntimeError, match=message):
        op(*args.values())
    for old, new in zip(before, args["params"] + args["states"], strict=True):
        assert torch.equal(old, bits(new))


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


@both
def test_a_compact_gradient_of_another_shape_is_refused(op):
    for kind in (ROWS, COLUMNS):
        problem = make_problem([Case(kind, (40, 64), compact_grad=True)])
        problem.grads[0] = torch.zeros(40, 64)
        with pytest.raises(RuntimeError, match=r"grads\[0\]: expected the compact shape"):
            problem.step(op)
