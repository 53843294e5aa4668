"""The ops of clipping on the CPU: native kernels against the reference and float64, and what both refuse."""

from dataclasses import replace

import cases.clip_grad as cases
import pytest
import torch
from cases.adamw import Case, bits, kinds, make_problem
from cases.masked_adamw import DTYPES, native
from cases.threads import threads
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl import ops, reference
from sparse_cl.layout import COLUMNS, DENSE, ELEMENTS, FIELDS, ROWS, TWO_FOUR

OPS = {"native": (ops.active_norm, ops.scale_active_), "ref": (reference.active_norm, reference.scale_active_)}
both = pytest.mark.parametrize(
    "norm_op, scale_op", [pytest.param(*pair, id=n, marks=[native] * (n == "native")) for n, pair in OPS.items()]
)

dtypes = pytest.mark.parametrize("dtype, grad_dtype", DTYPES.values(), ids=DTYPES)


@both
@pytest.mark.parametrize("options", cases.OPTIONS.values(), ids=cases.OPTIONS)
@dtypes
def test_active_entries_count_and_are_scaled(norm_op, scale_op, dtype, grad_dtype, options):
    cases.check(norm_op, scale_op, cases.all_cases(dtype, grad_dtype, options))


@both
def test_gradients_of_all_dtypes_in_one_call(norm_op, scale_op):
    all_dtypes = [case for dtype, grad in DTYPES.values() for case in cases.all_cases(dtype, grad, {})]
    cases.check(norm_op, scale_op, [*cases.EMPTY, *all_dtypes, *cases.EMPTY])


@native
@dtypes
def test_large_gradients_and_any_number_of_threads(dtype, grad_dtype):
    problem = cases.poisoned([replace(case, dtype=dtype, grad_dtype=grad_dtype) for case in cases.LARGE])
    rows = cases.rows_of(problem)
    with threads(2):
        many = cases.check(*OPS["native"], [replace(c, dtype=dtype, grad_dtype=grad_dtype) for c in cases.LARGE])
        norm = ops.active_norm(problem.grads, problem.states, rows)
    with threads(1):
        assert torch.equal(norm, ops.active_norm(problem.grads, problem.states, rows))
        ops.scale_active_(problem.grads, problem.states, rows, torch.tensor(cases.FACTOR, dtype=norm.dtype))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(many.grads, problem.grads, strict=True))


@native
def test_short_rows_lose_no_digits():
    """Their sums go through as many lanes as long ones; equal squares make rounding errors add up."""
    for case in (Case(ROWS, (60000, 1), density=1.0), Case(ROWS, (20000, 3)), Case(COLUMNS, (60000, 5), density=0.2)):
        problem = make_problem([case])
        problem.grads[0].fill_(0.3)
        exact = float(problem.grads[0].view(-1)[problem.positions(0)].double().norm())
        assert float(ops.active_norm(problem.grads, problem.states, problem.rows)) == pytest.approx(exact, rel=2e-6)


@both
def test_nothing_is_active(norm_op, scale_op):
    problem = cases.check(norm_op, scale_op, cases.EMPTY)
    assert norm_op(problem.grads, problem.states, cases.rows_of(problem)).item() == 0
    norm = norm_op([], [], torch.zeros(0, len(FIELDS), dtype=torch.int64))
    assert norm.item() == 0 and norm.shape == () and norm.dtype == torch.float32
    scale_op([], [], torch.zeros(0, len(FIELDS), dtype=torch.int64), torch.tensor(0.5))


@both
@dtypes
def test_a_factor_of_one_changes_no_bit(norm_op, scale_op, dtype, grad_dtype):
    problem = make_problem(cases.all_cases(dtype, grad_dtype, {}))
    for grad in problem.grads:
        grad.view(torch.uint8).copy_(torch.randint(256, grad.view(torch.uint8).shape, dtype=torch.uint8))
    before = problem.clone()
    for factor in (torch.tensor(1.0), torch.ones(1, dtype=torch.float64)):
        scale_op(problem.grads, problem.states, cases.rows_of(problem), factor)
    for old, new in zip(before.grads, problem.grads, strict=True):
        # The reference multiplies, which makes a signalling NaN quiet.
        same = bits(old) == bits(new) if scale_op is ops.scale_active_ else (old == new) | old.isnan()
        assert same.all()


@both
@pytest.mark.parametrize("factor", [0.0, torch.nan])
def test_numbers_that_are_none_go_where_torch_sends_them(norm_op, scale_op, factor):
    for bad in (torch.nan, torch.inf):
        problem = make_problem(kinds())
        for i, grad in enumerate(problem.grads):
            grad.view(-1)[problem.positions(i)[0]] = bad
        rows = cases.rows_of(problem)
        torch.testing.assert_close(
            norm_op(problem.grads, problem.states, rows), torch.tensor(bad).abs(), equal_nan=True
        )
        expected = [torch.where(cases.active(problem, i), g * factor, g) for i, g in enumerate(problem.grads)]
        scale_op(problem.grads, problem.states, rows, torch.tensor(factor))
        for grad, value in zip(problem.grads, expected, strict=True):
            torch.testing.assert_close(grad, value, rtol=0, atol=0, equal_nan=True)


@st.composite
def any_case(draw):
    kind = draw(st.sampled_from([DENSE, ROWS, COLUMNS, ELEMENTS, TWO_FOUR]))
    dims = 2 if kind in (COLUMNS, TWO_FOUR) else draw(st.integers(1 if kind == ROWS else 0, 3))
    shape = [draw(st.integers(0, 70)) for _ in range(dims)]
    if kind == TWO_FOUR:
        shape[1] *= 4
    dtype, grad_dtype = draw(st.sampled_from(list(DTYPES.values())))
    return Case(
        kind,
        tuple(shape),
        dtype,
        grad_dtype,
        density=draw(st.sampled_from([0.0, 0.03, 0.5, 1.0])),
        strided=draw(st.booleans()),
        shift=draw(st.integers(0, 5)),
        compact_grad=kind in (ROWS, COLUMNS) and draw(st.booleans()),
    )


@native
@given(st.lists(any_case(), min_size=1, max_size=4))
def test_any_shapes_and_masks(drawn):
    cases.check(*OPS["native"], drawn)


def test_opcheck():
    for drawn in (kinds(), kinds(torch.bfloat16, grad_dtype=torch.float32), kinds(torch.float64), cases.EMPTY):
        problem = make_problem(drawn)
        args = (problem.grads, problem.states, cases.rows_of(problem))
        torch.library.opcheck(ops.active_norm, args)
        torch.library.opcheck(ops.scale_active_, (*args, torch.tensor(0.5)))


def malformed():
    """Ways to spoil the second of two gradients, each with what the message must say."""

    def field(name, value):
        return lambda args: args["layout"][1].__setitem__(FIELDS.index(name), value)

    def put(part, make):
        return lambda args: args[part].__setitem__(1, make(args[part][1]))

    def replaced(name, make):
        return lambda args: args.__setitem__(name, make(args[name]))

    return {
        "a state is missing": (lambda args: args["states"].pop(), "as many states as grads"),
        "a row of the layout is missing": (replaced("layout", lambda t: t[:1]), "layout"),
        "a column of the layout is missing": (replaced("layout", lambda t: t[:, 1:].contiguous()), "layout"),
        "layout of floats": (replaced("layout", torch.Tensor.double), "layout"),
        "unknown kind": (field("kind", 5), "layout.1."),
        "no cohort": (field("cohorts", 0), "layout.1."),
        "a gradient that should be compact": (field("compact_grad", 1), r"\[1\]"),
        "more units than there are": (field("units", 37 * 40 + 1), "layout.1."),
        "negative units": (field("units", -1), "layout.1."),
        "no index": (field("index_offset", 0), r"states\[1\]"),
        "index past the end": (field("index_offset", 1 << 20), r"states\[1\]"),
        "index not aligned": (field("index_offset", 68), r"states\[1\]"),
        "fewer columns": (put("grads", lambda t: t[:, :39].contiguous()), r"\[1\]"),
        "another shape": (put("grads", lambda t: t.view(40, 37)), r"\[1\]"),
        "empty state": (put("states", lambda t: t[:0]), r"states\[1\]"),
        "state of floats": (put("states", lambda t: t.view(torch.float32)), r"states\[1\]"),
        "strided state": (put("states", lambda t: torch.stack([t, t], 1)[:, 0]), r"states\[1\]"),
        "integer gradient": (put("grads", torch.Tensor.int), r"grads\[1\]"),
        "two factors": (replaced("factor", lambda t: t.expand(2)), "factor"),
        "integer factor": (replaced("factor", torch.Tensor.int), "factor"),
    }


@both
@pytest.mark.parametrize("kind", [ROWS, ELEMENTS])
@pytest.mark.parametrize("spoil, message", malformed().values(), ids=malformed())
def test_malformed_calls_raise_and_change_nothing(norm_op, scale_op, kind, spoil, message):
    problem = make_problem([Case(DENSE), Case(kind)])
    factor = torch.tensor(0.5)
    args = {"grads": problem.grads, "states": problem.states, "layout": cases.rows_of(problem), "factor": factor}
    spoil(args)
    before = [bits(t).clone() for t in args["grads"]]
    with pytest.raises(RuntimeError, match=f"scale_active_: .*{message}"):
        scale_op(*args.values())
    assert all(torch.equal(old, bits(new)) for old, new in zip(before, args["grads"], strict=True))
    if message != "factor":
        with pytest.raises(RuntimeError, match=f"active_norm: .*{message}"):
            norm_op(*list(args.values())[:3])


@both
def test_a_compact_gradient_of_another_shape_is_refused(norm_op, scale_op):
    for kind in (ROWS, COLUMNS):
        problem = make_problem([Case(kind, (40, 64), compact_grad=True)])
        with pytest.raises(RuntimeError, match=r"grads\[0\]: expected the compact shape"):
            norm_op([torch.zeros(40, 64)], problem.states, cases.rows_of(problem))
