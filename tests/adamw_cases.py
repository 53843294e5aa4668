"""Problems for ``masked_adamw_`` and what every implementation of it must show, on any device."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
    """One parameter. ``strided``: a transposed view; ``shift``: elements by which its address is misaligned."""

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


@dataclass
class Problem:
    """Parameters with their gradients and states, before or after a step."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[Tensor]
    layouts: list[StateLayout]

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
        return result

    def step(self, op: Callable, **hyper) -> None:
        hyper = HYPER | hyper
        rows = torch.tensor([layout.row() for layout in self.layouts], dtype=torch.int64).view(-1, len(FIELDS))
        op(self.params, self.grads, self.states, rows, *(hyper[name] for name in HYPER))


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
    views["exp_avg_sq"].copy_(0.01 * torch.rand(compact, generator=rng))
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
            allowed = 2 * (plain[name].double() - value).norm().item() + tiny * value.norm().item()
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
    before = make_problem(cases, device, seed)
    mine, torch_step, oracle = before.clone(), before.clone(), before.in_float64()
    for _ in range(steps):
        mine.step(op, **hyper)
        torch_step.step(reference.masked_adamw_, **hyper)
        oracle.step(reference.masked_adamw_, **hyper)
    check_accuracy(mine, torch_step, oracle, cases)
    check_untouched(before, mine, steps, cases)
    return mine


def same_random_bits(mine: Problem, torch_step: Problem, i: int) -> float:
    """Fraction of entries that equal the reference's bit for bit; near 1 only if both draw the same random bits."""
    return (numbers(mine, i)["param"] == numbers(torch_step, i)["param"]).double().mean().item()


def kinds(dtype: torch.dtype = torch.float32, **options) -> list[Case]:
    """Cases of every kind that allows the options, of shapes that take wide accesses and of shapes that do not."""
    shapes = {
        DENSE: [(64, 96), (5, 7, 61), (1,)],
        ROWS: [(40, 64), (41, 51), (300,), (7, 3, 5)],
        COLUMNS: [(33, 64), (40, 51)],
        ELEMENTS: [(64, 96), (97, 53), (3, 1024)],
        TWO_FOUR: [(24, 64), (5, 52)],
    }
    result = []
    for kind, of_kind in shapes.items():
        by_unit = kind in (ROWS, COLUMNS)
        if not by_unit and (options.get("gain") or options.get("compact_grad") or options.get("scope") == PER_UNIT):
            continue
        result += [Case(kind=kind, shape=shape, dtype=dtype, **options) for shape in of_kind]
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
    "compact-gradient": dict(compact_grad=True),
    "compact-gradient-gain": dict(compact_grad=True, gain=True, strided=True, cohorts=2, scope=PER_ENTRY),
}

SAME_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}

#: Parameters that also take gradients in float32.
FLOAT_GRADIENTS = {name: dtype for name, dtype in SAME_DTYPES.items() if name != "fp32"}
