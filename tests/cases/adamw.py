"""Problems for ``masked_adamw_`` and ``apply_updates_``, and what every implementation must show, on any device."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparse_cl import reference
from sparse_cl.layout import (
    COLUMNS,
    DENSE,
    ELEMENTS,
    FIELDS,
    INDEX_NAME,
    PER_ENTRY,
    PER_UNIT,
    ROWS,
    SHARED,
    TWO_FOUR,
    StateLayout,
    state_dtype,
)
from sparse_cl.reference import active_positions, block_ranks, pack_bits

MOVING = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master")
HYPER = dict(
    lr=0.05,
    lr_tensor=None,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.1,
    maximize=False,
    grad_scale=None,
    found_inf=None,
)


@dataclass(frozen=True)
class Case:
    """One parameter.

    ``strided``: a transposed view; ``shift``: elements by which its address is misaligned; ``clusters``: the ranges of
    weights that an element mask holds, random ones elsewhere.
    """

    kind: int = DENSE
    shape: tuple[int, ...] = (37, 40)
    dtype: torch.dtype = torch.float32
    grad_dtype: torch.dtype | None = None
    density: float = 0.5
    master: bool = False
    amsgrad: bool = False
    gain: bool = False
    cohorts: int = 1
    scope: int = SHARED
    strided: bool = False
    shift: int = 0
    compact_grad: bool = False
    by_row: bool = False
    clusters: tuple[tuple[int, int], ...] = ()


@dataclass
class Problem:
    """Parameters with their gradients and states, before or after a step.

    Where it has ``updates``, a step writes these instead of the parameters.
    """

    params: list[Tensor]
    grads: list[Tensor]
    states: list[Tensor]
    layouts: list[StateLayout]
    updates: list[Tensor] = field(default_factory=list)

    def views(self, i: int) -> dict[str, Tensor]:
        return self.layouts[i].views(self.states[i])

    def positions(self, i: int) -> Tensor:
        """Flat positions of the active entries of a parameter."""
        return active_positions(self.layouts[i], self.views(i), self.params[i].device)

    def clone(self) -> Problem:
        return copy.deepcopy(self)

    def in_float64(self) -> Problem:
        """The same numbers in float64: the oracle."""
        result = Problem([p.double() for p in self.params], [g.double() for g in self.grads], [], [])
        for i, layout in enumerate(self.layouts):
            wide = replace(layout, dtype=torch.float64)
            buffer, views = wide.allocate(self.states[i].device)
            for name, value in self.views(i).items():
                views[name].copy_(value)
            result.states.append(buffer)
            result.layouts.append(wide)
        result.updates = [u.double() for u in self.updates]
        return result

    def with_updates(self, seed: int | None = None) -> Problem:
        """A copy that has updates: NaN, which a step must overwrite, or small random ones."""
        result, rng = self.clone(), torch.Generator().manual_seed(seed or 0)
        for layout, param in zip(self.layouts, self.params, strict=True):
            update = torch.full(layout.compact_shape, torch.nan, dtype=layout.dtype)
            if seed is not None:
                update.copy_(0.01 * torch.randn(layout.compact_shape, generator=rng))
            result.updates.append(update.to(param.device))
        return result

    @property
    def rows(self) -> Tensor:
        """The ops' ``layout``."""
        return torch.tensor([layout.row() for layout in self.layouts], dtype=torch.int64).view(-1, len(FIELDS))

    def step(self, op: Callable, **hyper) -> None:
        hyper = HYPER | hyper
        op(self.params, self.grads, self.states, self.updates, self.rows, *(hyper[name] for name in HYPER))

    def apply(self, op: Callable, found_inf: Tensor | None = None) -> None:
        """Calls ``apply_updates_``."""
        op(self.params, self.states, self.updates, self.rows, found_inf)


def make_problem(cases: Sequence[Case], device: torch.device | str = "cpu", seed: int = 0) -> Problem:
    """Random parameters, gradients, masks, gains, step counts and states as the cases say."""
    rng = torch.Generator().manual_seed(seed)
    problem = Problem([], [], [], [])
    for i, case in enumerate(cases):
        param = torch.randn(case.shape, generator=rng).to(case.dtype)
        grad = (torch.randn(case.shape, generator=rng) * 0.1).to(case.grad_dtype or case.dtype)
        index, units, ranks = _mask(case, rng)
        layout = StateLayout(
            kind=case.kind,
            shape=case.shape,
            units=units,
            dtype=state_dtype(case.dtype),
            gain=case.gain,
            amsgrad=case.amsgrad,
            master=case.master,
            cohorts=case.cohorts,
            cohort_scope=case.scope,
            seed=1000 + i,
            compact_grad=case.compact_grad,
            by_row=case.by_row,
        )
        buffer, views = layout.allocate(torch.device("cpu"))
        _fill(layout, views, index, ranks, param, rng)
        if case.compact_grad:
            grad = grad.reshape(-1)[active_positions(layout, views, grad.device)].view(layout.compact_shape)
        problem.params.append(_place(param, case, device))
        problem.grads.append(_place(grad, case, device))
        problem.states.append(buffer.to(device))
        problem.layouts.append(layout)
    return problem


def _mask(case: Case, rng: torch.Generator) -> tuple[Tensor | None, int, Tensor | None]:
    if case.kind == DENSE:
        return None, math.prod(case.shape), None
    if case.kind in (ROWS, COLUMNS):
        size = case.shape[0 if case.kind == ROWS else 1]
        units = round(case.density * size)
        return torch.randperm(size, generator=rng)[:units].sort().values.to(torch.int32), units, None
    if case.kind == ELEMENTS:
        dense = torch.rand(case.shape, generator=rng) < case.density
        if case.clusters:
            dense.zero_()
        for start, stop in case.clusters:
            dense.view(-1)[start:stop] = True
        return pack_bits(dense), int(dense.sum()), block_ranks(dense)
    order = torch.rand(math.prod(case.shape) // 4, 4, generator=rng).argsort(1)
    return pack_bits((order < 2).view(case.shape)), math.prod(case.shape) // 2, None


def _fill(layout, views, index, ranks, param, rng) -> None:
    if index is not None:
        views[INDEX_NAME[layout.kind]].copy_(index)
    if ranks is not None:
        views["ranks"].copy_(ranks)
    if "gain" in views:
        views["gain"].copy_(0.25 + 1.5 * torch.rand(views["gain"].shape, generator=rng))
    if "cohort" in views:
        views["cohort"].copy_(torch.randint(layout.cohorts, views["cohort"].shape, generator=rng))
    views["step"].copy_(torch.randint(0, 50, views["step"].shape, generator=rng))
    compact = layout.compact_shape
    views["exp_avg"].copy_(0.1 * torch.randn(compact, generator=rng))
    views["exp_avg_sq"].copy_(0.01 * torch.rand(views["exp_avg_sq"].shape, generator=rng))
    if "max_exp_avg_sq" in views:
        views["max_exp_avg_sq"].copy_(0.01 * torch.rand(compact, generator=rng))
    if "master" in views:
        active = param.reshape(-1)[active_positions(layout, views, param.device)].view(compact).to(layout.dtype)
        views["master"].copy_(active * (1 + 1e-4 * torch.randn(compact, generator=rng)))


def _place(t: Tensor, case: Case, device) -> Tensor:
    flat = torch.empty(t.numel() + case.shift, dtype=t.dtype, device=device)[case.shift :]
    if not case.strided:
        return flat.view(t.shape).copy_(t)
    return flat.view(t.shape[::-1]).permute(tuple(reversed(range(t.dim())))).copy_(t)


def bits(t: Tensor) -> Tensor:
    """The tensor's bytes, so that NaN and -0 compare as they are stored."""
    return t.contiguous().view(-1).view(torch.uint8)


def numbers(problem: Problem, i: int) -> dict[str, Tensor]:
    """What a step computes for a parameter, its frozen entries left out."""
    views = problem.views(i)
    result = {name: views[name].reshape(-1) for name in MOVING[1:] if name in views}
    if problem.updates:
        result["update"] = problem.updates[i].reshape(-1)
    return result | {"param": problem.params[i].reshape(-1)[problem.positions(i)]}


def check_accuracy(mine: Problem, torch_step: Problem, oracle: Problem, names: Sequence[object] = ()) -> None:
    """err(mine, oracle) <= 2 err(reference in the same dtype, oracle) + tiny, for every tensor that a step writes."""
    for i, layout in enumerate(mine.layouts):
        got, plain, exact = numbers(mine, i), numbers(torch_step, i), numbers(oracle, i)
        for name, value in exact.items():
            # In float64 the oracle's own bias corrections, 1 - beta**t, are good to about 1e-13. A few entries may have
            # cancelled, or been lucky in the reference.
            tiny = 1e-12 if layout.dtype == torch.float64 else 1.2e-7 if value.numel() >= 16 else 1e-5
            error = (got[name].double() - value).norm().item()
            # An update is the difference of two weights, and has their rounding errors.
            scale = exact["param"] if name == "update" else value
            allowed = 2 * (plain[name].double() - value).norm().item() + tiny * scale.norm().item()
            assert error <= allowed, f"{name} of {names[i] if names else i}: error {error:.3g}, allowed {allowed:.3g}"


def check_untouched(before: Problem, after: Problem, advanced: int, names: Sequence[object] = ()) -> None:
    """Frozen entries and everything in the state but its moving sections keep their bytes; counts go up."""
    for i in range(len(before.params)):
        which = names[i] if names else i
        frozen = torch.ones(before.params[i].numel(), dtype=torch.bool, device=before.params[i].device)
        frozen[before.positions(i)] = False
        old, new = before.params[i].reshape(-1)[frozen], after.params[i].reshape(-1)[frozen]
        assert torch.equal(bits(old), bits(new)), f"frozen entries of {which} changed"
        active = advanced if len(before.positions(i)) else 0
        assert torch.equal(before.views(i)["step"] + active, after.views(i)["step"]), f"step counts of {which}"
        first, second = before.states[i].clone(), after.states[i].clone()
        for state in (first, second):
            for name in MOVING:
                if name in before.views(i):
                    before.layouts[i].views(state)[name].zero_()
        assert torch.equal(first, second), f"state of {which} changed outside of its moving sections"


def check_step(op: Callable, cases: Sequence[Case], device="cpu", seed: int = 0, steps: int = 1, **hyper) -> Problem:
    """Runs ``op`` and checks accuracy and what must not change; returns the problem after the steps."""
    return _check_steps(op, make_problem(cases, device, seed), cases, steps, hyper)


def _check_steps(op: Callable, before: Problem, cases: Sequence[Case], steps: int, hyper: dict) -> Problem:
    mine, torch_step, oracle = before.clone(), before.clone(), before.in_float64()
    for _ in range(steps):
        mine.step(op, **hyper)
        torch_step.step(reference.masked_adamw_, **hyper)
        oracle.step(reference.masked_adamw_, **hyper)
    check_accuracy(mine, torch_step, oracle, cases)
    check_untouched(before, mine, steps, cases)
    return mine


def check_update(op: Callable, cases: Sequence[Case], device="cpu", seed: int = 0, steps: int = 1, **hyper) -> Problem:
    """Runs ``op`` with updates and checks these, the moments, and that no weight changes."""
    before = make_problem(cases, device, seed).with_updates()
    mine = _check_steps(op, before, cases, steps, hyper)
    for i, case in enumerate(cases):
        assert torch.equal(bits(before.params[i]), bits(mine.params[i])), f"weights of {case} changed"
        if case.master:
            assert torch.equal(before.views(i)["master"], mine.views(i)["master"]), f"master of {case} changed"
    return mine


def check_skipped_update(op: Callable, cases: Sequence[Case], device="cpu", found: float = 1.0) -> None:
    """Where found_inf is not zero, updates become zero and nothing else changes."""
    before = make_problem(cases, device).with_updates()
    mine = before.clone()
    for grad in mine.grads:
        grad.fill_(torch.inf)
    mine.step(op, found_inf=torch.tensor(found, device=device), grad_scale=torch.tensor(2.0, device=device))
    assert not any(update.any() for update in mine.updates)
    for old, new in zip(before.params + before.states, mine.params + mine.states, strict=True):
        assert torch.equal(bits(old), bits(new))


def check_apply(apply: Callable, cases: Sequence[Case], device="cpu", seed: int = 0) -> Problem:
    """Applies random updates: one addition and one rounding an entry, so to the bit what the reference makes."""
    before = make_problem(cases, device, seed).with_updates(seed=seed + 1)
    skipped, mine, expected = before.clone(), before.clone(), before.clone()
    skipped.apply(apply, torch.tensor(torch.nan, device=device))
    mine.apply(apply, torch.tensor(0.0, device=device) if seed % 2 else None)
    expected.apply(reference.apply_updates_)
    check_untouched(before, mine, 0, cases)
    for i, case in enumerate(cases):
        assert torch.equal(bits(before.params[i]), bits(skipped.params[i])), f"a skipped update changed {case}"
        assert torch.equal(before.states[i], skipped.states[i]), f"a skipped update changed the state of {case}"
        assert torch.equal(bits(before.updates[i]), bits(mine.updates[i])), f"the update of {case} changed"
        assert torch.equal(bits(expected.params[i]), bits(mine.params[i])), f"weights of {case}"
        assert torch.equal(expected.states[i], mine.states[i]), f"state of {case}"
    return mine


def check_two_halves(op: Callable, apply: Callable, cases: Sequence[Case], device="cpu", steps: int = 1) -> None:
    """An update that is applied as it is makes the step that ``op`` makes at once, up to one more rounding."""
    mine, at_once = make_problem(cases, device).with_updates(), make_problem(cases, device)
    for _ in range(steps):
        mine.step(op)
        mine.apply(apply)
        at_once.step(op)
    for i, (case, layout) in enumerate(zip(cases, at_once.layouts, strict=True)):
        assert torch.equal(mine.views(i)["step"], at_once.views(i)["step"])
        got, expected = numbers(mine, i), numbers(at_once, i)
        weight = "master" if case.master else "param"
        if case.dtype.itemsize == 2 and not case.master:
            # The same random bits, but a last bit of float32 may tip the rounding.
            if steps == 1 and expected[weight].numel() >= 100:
                assert (got[weight] == expected[weight]).double().mean() > 0.99, case
            continue
        error = (got[weight] - expected[weight]).norm()
        assert error <= 2 * steps * torch.finfo(layout.dtype).eps * expected[weight].norm(), case
        if case.master:
            rounded = mine.views(i)["master"].to(case.dtype).reshape(-1)
            assert torch.equal(bits(got["param"]), bits(rounded)), f"{case} is not its rounded master"


def same_random_bits(mine: Problem, torch_step: Problem, i: int) -> float:
    """Fraction of entries that equal the reference's bit for bit; near 1 only if both draw the same random bits."""
    return (numbers(mine, i)["param"] == numbers(torch_step, i)["param"]).double().mean().item()


def kinds(dtype: torch.dtype = torch.float32, **options) -> list[Case]:
    """Cases of every kind that allows the options, of shapes that take wide accesses and of shapes that do not."""
    shapes = {
        DENSE: [(64, 96), (5, 7, 61), (23, 61), (1,)],
        ROWS: [(40, 64), (41, 51), (300,), (7, 3, 5)],
        COLUMNS: [(33, 64), (40, 51)],
        ELEMENTS: [(64, 96), (97, 53), (3, 1024)],
        TWO_FOUR: [(24, 64), (5, 52), (6, 36)],
    }
    result = []
    for kind, of_kind in shapes.items():
        by_unit = kind in (ROWS, COLUMNS)
        if not by_unit and (options.get("gain") or options.get("compact_grad") or options.get("scope") == PER_UNIT):
            continue
        result += [Case(kind=kind, shape=shape, dtype=dtype, **options) for shape in of_kind]
    if options.get("by_row"):
        result = [case for case in result if case.kind in (DENSE, ROWS) and len(case.shape) == 2]
    return result


#: Options of a parameter, one dict a test.
OPTIONS = {
    "plain": {},
    "amsgrad": dict(amsgrad=True),
    "gain": dict(gain=True),
    "shared-cohort": dict(cohorts=1, scope=SHARED),
    "unit-cohorts": dict(cohorts=3, scope=PER_UNIT, gain=True),
    "entry-cohorts": dict(cohorts=256, scope=PER_ENTRY, amsgrad=True),
    "sparse": dict(density=0.05),
    "full": dict(density=1.0),
    "strided": dict(strided=True),
    "misaligned": dict(shift=1),
    "by-row": dict(by_row=True),
    "by-row-strided": dict(by_row=True, strided=True, shift=1),
    "by-row-cohorts": dict(by_row=True, cohorts=3, scope=PER_ENTRY),
    "by-row-gain": dict(by_row=True, gain=True, cohorts=3, scope=PER_UNIT, compact_grad=True),
    "compact-gradient": dict(compact_grad=True),
    "compact-gradient-gain": dict(compact_grad=True, gain=True, strided=True, cohorts=2, scope=PER_ENTRY),
}

SAME_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}

#: Parameters that also take gradients in float32.
FLOAT_GRADIENTS = {name: dtype for name, dtype in SAME_DTYPES.items() if name != "fp32"}
