"""Problems for ``active_norm`` and ``scale_active_`` and what every implementation must show, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from cases.adamw import Case, Problem, bits, kinds, make_problem
from torch import Tensor

from sparse_cl import reference
from sparse_cl.layout import COLUMNS, DENSE, ELEMENTS, FIELDS, ROWS, TWO_FOUR

FACTOR = 0.37

#: Options of a gradient, one dict a test.
OPTIONS = {
    "plain": {},
    "sparse": dict(density=0.05),
    "full": dict(density=1.0),
    "strided": dict(strided=True),
    "misaligned": dict(shift=1),
    "compact-gradient": dict(compact_grad=True),
    "compact-strided": dict(compact_grad=True, strided=True),
    "sections": dict(amsgrad=True, gain=True),
}

#: Several chunks a task, rows that straddle them, words that are full, empty or in part there.
LARGE = [
    Case(DENSE, (1234567,)),
    Case(ROWS, (5, 30001), density=0.8),
    Case(ROWS, (40, 8192), density=0.3),
    Case(ROWS, (60000, 1), density=0.9),
    Case(ROWS, (400, 401), compact_grad=True),
    Case(COLUMNS, (301, 401)),
    Case(COLUMNS, (3, 90001), density=0.7),
    Case(ELEMENTS, (1333, 401)),
    Case(ELEMENTS, (70001,), density=0.01),
    Case(ELEMENTS, (7, 25000), density=1.0),
    Case(ELEMENTS, (3000, 300), density=1e-5),
    Case(TWO_FOUR, (301, 400)),
]

EMPTY = [
    Case(DENSE, (0,)),
    Case(DENSE, (0, 3)),
    Case(ROWS, (0, 4)),
    Case(ROWS, (5, 0)),
    Case(ROWS, (5, 4), density=0.0),
    Case(ROWS, (5, 4), density=0.0, compact_grad=True),
    Case(COLUMNS, (0, 5)),
    Case(COLUMNS, (5, 0)),
    Case(COLUMNS, (4, 5), density=0.0),
    Case(ELEMENTS, (0, 4)),
    Case(ELEMENTS, (40, 50), density=0.0),
    Case(TWO_FOUR, (0, 4)),
    Case(TWO_FOUR, (3, 0)),
]


def rows_of(problem: Problem) -> Tensor:
    return torch.tensor([layout.row() for layout in problem.layouts], dtype=torch.int64).view(-1, len(FIELDS))


def poisoned(cases: Sequence[Case], device: torch.device | str = "cpu") -> Problem:
    """A problem whose frozen entries hold what must not count: NaN and infinities."""
    problem = make_problem(cases, device)
    for i, grad in enumerate(problem.grads):
        frozen = ~active(problem, i)
        poison = torch.tensor([torch.nan, torch.inf, -torch.inf], device=grad.device, dtype=grad.dtype)
        grad.copy_(
            torch.where(frozen, poison[torch.arange(grad.numel(), device=grad.device) % 3].view_as(frozen), grad)
        )
    return problem


def active(problem: Problem, i: int) -> Tensor:
    """bool, of the gradient's shape."""
    grad = problem.grads[i]
    if problem.layouts[i].compact_grad:
        return torch.ones(grad.shape, dtype=torch.bool, device=grad.device)
    flat = torch.zeros(grad.numel(), dtype=torch.bool, device=grad.device)
    flat[problem.positions(i)] = True
    return flat.view(grad.shape)


def check(norm_op: Callable, scale_op: Callable, cases: Sequence[Case], device="cpu") -> Problem:
    """The norm against float64, the products bit for bit, and that all else keeps its bytes; returns what is left."""
    problem = poisoned(cases, device)
    before, rows = problem.clone(), rows_of(problem)
    norm = norm_op(problem.grads, problem.states, rows)
    check_norm(norm, problem)
    factor = torch.tensor(FACTOR, dtype=norm.dtype, device=norm.device)
    scale_op(problem.grads, problem.states, rows, factor)
    for i, (case, old, new) in enumerate(zip(cases, before.grads, problem.grads, strict=True)):
        where, wide = active(before, i), torch.promote_types(old.dtype, torch.float32)
        expected = torch.where(where, (old.to(wide) * factor.to(wide)).to(old.dtype), old)
        assert torch.equal(bits(new), bits(expected)), f"gradient of {case}"
    for old, new in zip(before.states, problem.states, strict=True):
        assert torch.equal(old, new)
    return problem


def check_norm(norm: Tensor, problem: Problem) -> None:
    """err(norm, float64) <= 2 err(torch's) + one rounding of what is summed; in float64, the oracle rounds as well."""
    chosen = [grad[active(problem, i)].double() for i, grad in enumerate(problem.grads)]
    exact = float(torch.cat(chosen).norm())
    theirs = reference.active_norm(problem.grads, problem.states, rows_of(problem))
    assert norm.shape == () and norm.dtype == theirs.dtype and norm.device == theirs.device
    tiny = 1e-13 if all(x.dtype == torch.float64 for x in problem.grads) else torch.finfo(torch.float32).eps
    error, allowed = abs(float(norm) - exact), 2 * abs(float(theirs) - exact) + tiny * exact
    assert error <= allowed, f"norm {float(norm)}, expected {exact}"


def all_cases(dtype: torch.dtype, grad_dtype: torch.dtype | None, options: dict) -> list[Case]:
    """Cases of every kind that the options allow, gradients in the parameter's dtype or ``grad_dtype``."""
    unit_only = {key: options[key] for key in ("gain", "compact_grad") if key in options}
    cases = kinds(dtype, grad_dtype=grad_dtype, **options)
    if unit_only:
        rest = {key: value for key, value in options.items() if key not in unit_only}
        cases += [c for c in kinds(dtype, grad_dtype=grad_dtype, **rest) if c.kind in (DENSE, ELEMENTS, TWO_FOUR)]
    return cases
