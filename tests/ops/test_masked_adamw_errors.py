"""Malformed calls of masked_adamw_: native code and reference refuse them, say why, and change nothing."""

import pytest
import torch
from cases.adamw import HYPER, Case, bits, make_problem
from cases.masked_adamw import both

from sparse_cl.layout import COLUMNS, DENSE, ELEMENTS, FIELDS, PER_ENTRY, ROWS


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
def test_a_compact_gradient_of_another_shape_is_refused(op):
    for kind in (ROWS, COLUMNS):
        problem = make_problem([Case(kind, (40, 64), compact_grad=True)])
        problem.grads[0] = torch.zeros(40, 64)
        with pytest.raises(RuntimeError, match=r"grads\[0\]: expected the compact shape"):
            problem.step(op)
