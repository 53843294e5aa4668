"""What tests of masked_adamw_ on the CPU share: the implementations, all precisions, large and empty parameters."""

import pytest
import torch
from cases.adamw import Case, bits, check_step, kinds

from sparse_cl import ops, reference
from sparse_cl.layout import COLUMNS, DENSE, ELEMENTS, PER_ENTRY, PER_UNIT, ROWS, TWO_FOUR

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
