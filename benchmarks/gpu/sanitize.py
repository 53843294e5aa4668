"""The kernels on small problems, for compute-sanitizer to watch; results are compared on the CPU.

    PYTHONPATH=.:tests PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python benchmarks/gpu/sanitize.py [--tiny]

Nothing else runs on the device: a reference there would be many more kernels to watch, and none of ours. Without the
caching every tensor is an allocation of its own, or the tool would see no access past its end.
"""

from __future__ import annotations

import sys

import cases.gram_factor as gram_factor_cases
import torch
from cases.adamw import OPTIONS, Problem, check_accuracy, check_untouched, kinds, make_problem

from benchmarks.gpu.run import DEVICE
from sparse_cl import ops, reference

ADAMW = ("plain", "amsgrad", "unit-cohorts", "entry-cohorts", "sparse", "misaligned", "compact-gradient-gain")
GRAM = ("one", "odd", "batch", "zero", "duplicates", "past_shared_memory", "large")


def on_cpu(problem: Problem) -> Problem:
    params, grads, states = ([t.cpu() for t in part] for part in (problem.params, problem.grads, problem.states))
    return Problem(params, grads, states, problem.layouts)


def check_adamw(dtype: torch.dtype, options: dict, master: bool) -> None:
    cases = kinds(dtype, master=master, **options)
    mine, before = make_problem(cases, DEVICE), make_problem(cases)
    plain, oracle = before.clone(), before.in_float64()
    mine.step(ops.masked_adamw_)
    for problem in (plain, oracle):
        problem.step(reference.masked_adamw_)
    mine = on_cpu(mine)
    check_accuracy(mine, plain, oracle, cases)
    check_untouched(before, mine, 1, cases)


def check_halves(dtype: torch.dtype, master: bool) -> None:
    """A step whose update is written apart and then added."""
    cases = kinds(dtype, master=master)
    mine, plain = make_problem(cases, DEVICE).with_updates(), make_problem(cases).with_updates()
    for problem, step, apply in (
        (mine, ops.masked_adamw_, ops.apply_updates_),
        (plain, reference.masked_adamw_, reference.apply_updates_),
    ):
        problem.step(step)
        problem.apply(apply)
    for i in range(len(cases)):
        torch.testing.assert_close(mine.updates[i].cpu(), plain.updates[i], rtol=1e-4, atol=1e-6)


def check_clipping(dtype: torch.dtype) -> None:
    problem, plain = make_problem(kinds(dtype), DEVICE), make_problem(kinds(dtype))
    norm = ops.active_norm(problem.grads, problem.states, problem.rows)
    ops.scale_active_(problem.grads, problem.states, problem.rows, norm)
    expected = reference.active_norm(plain.grads, plain.states, plain.rows)
    reference.scale_active_(plain.grads, plain.states, plain.rows, expected)
    for grad, right in zip([norm, *problem.grads], [expected, *plain.grads], strict=True):
        torch.testing.assert_close(grad.cpu(), right, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-6)


def main() -> None:
    most = 1 if "--tiny" in sys.argv else None
    dtypes = ((torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False))[:most]
    adamw = [(dtype, OPTIONS[name], master) for dtype, master in dtypes for name in ADAMW[:most]]
    for dtype, options, master in [*adamw, (torch.float32, dict(density=0.0), False)]:
        check_adamw(dtype, options, master)
    for dtype, master in dtypes:
        check_halves(dtype, master)
        check_clipping(dtype)
    for name in GRAM[:most]:
        gram_factor_cases.check(ops.gram_factor, name, DEVICE)
    print(f"checked {len(adamw) + 1 + 2 * len(dtypes) + len(GRAM[:most])} problems on {DEVICE}")


if __name__ == "__main__":
    main()
