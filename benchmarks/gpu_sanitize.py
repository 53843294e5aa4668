"""The kernels on small problems, for compute-sanitizer to watch; results are compared on the CPU.

    PYTHONPATH=.:tests PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python benchmarks/gpu_sanitize.py [--tiny]

Nothing else runs on the device: a reference there would be many more kernels to watch, and none of ours. Without the
caching every tensor is an allocation of its own, or the tool would see no access past its end.
"""

from __future__ import annotations

import sys

import gram_factor_cases
import torch
from adamw_cases import OPTIONS, Problem, check_accuracy, check_untouched, kinds, make_problem
from gpu_run import DEVICE

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


def main() -> None:
    most = 1 if "--tiny" in sys.argv else None
    dtypes = ((torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False))[:most]
    adamw = [(dtype, OPTIONS[name], master) for dtype, master in dtypes for name in ADAMW[:most]]
    for dtype, options, master in [*adamw, (torch.float32, dict(density=0.0), False)]:
        check_adamw(dtype, options, master)
    for name in GRAM[:most]:
        gram_factor_cases.check(ops.gram_factor, name, DEVICE)
    print(f"checked {len(adamw) + 1 + len(GRAM[:most])} problems on {DEVICE}")


if __name__ == "__main__":
    main()
