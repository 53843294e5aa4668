"""The CUDA kernel's own source, compiled for the CPU by tests/cuda_emulation: its logic without a GPU."""

import hashlib
import os
import shutil
import subprocess
import sys
from ctypes import CDLL
from pathlib import Path

import pytest
import torch
from adamw_cases import (
    FLOAT_GRADIENTS,
    OPTIONS,
    SAME_DTYPES,
    Case,
    check_step,
    kinds,
    make_problem,
    same_random_bits,
)

from sparse_cl import ops, reference
from sparse_cl.layout import DENSE, ELEMENTS, PER_ENTRY, PER_UNIT, ROWS, TWO_FOUR

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "csrc").glob("*.[hc]*"), *(ROOT / "tests" / "cuda_emulation").iterdir()])

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def build(*flags: str) -> Path:
    """The emulated library, built once for each state of its sources."""
    torch_folder = Path(torch.__file__).parent
    command = [
        *("g++", "-std=c++17", "-g", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-strict-aliasing"),
        *("-Wall", "-Werror", "-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-DUSE_CUDA"),
        "-DSPARSE_CL_CUDA_THREADS=64",  # a barrier costs a context switch a thread
        *("-I", str(ROOT / "tests" / "cuda_emulation"), "-isystem", str(torch_folder / "include"), *flags),
        str(ROOT / "tests" / "cuda_emulation" / "masked_adamw.cpp"),
        *("-L", str(torch_folder / "lib"), "-ltorch", "-ltorch_cpu", "-lc10"),
    ]
    key = hashlib.sha256(" ".join([*command, torch.__version__]).encode())
    for source in SOURCES:
        key.update(source.read_bytes())
    library = ROOT / "build" / "cuda_emulation" / f"{key.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.rename(library)
    return library


class Emulated:
    """The op, and how often it launched a kernel."""

    def __init__(self, library: Path):
        self._definition = torch.library.Library("sparse_cl_emulated", "DEF")
        self._definition.define(str(ops.masked_adamw_._schema).removeprefix("sparse_cl::"))
        torch.ops.load_library(library)
        self._library = CDLL(str(library))

    def __call__(self, *args) -> None:
        torch.ops.sparse_cl_emulated.masked_adamw_(*args)

    @property
    def launches(self) -> int:
        return self._library.emulated_launches()


@pytest.fixture(scope="session")
def op():
    return Emulated(os.environ.get("SPARSE_CL_EMULATED") or build("-O1"))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", SAME_DTYPES.values(), ids=SAME_DTYPES)
def test_agrees_with_the_oracle_and_leaves_the_rest(op, dtype, options):
    cases = [case for master in (False, True) for case in kinds(dtype, master=master, **options)]
    launches = op.launches
    check_step(op, cases)
    assert op.launches == launches + 1


@pytest.mark.parametrize("dtype", FLOAT_GRADIENTS.values(), ids=FLOAT_GRADIENTS)
def test_float32_gradients(op, dtype):
    for options in (dict(amsgrad=True, master=True), dict(cohorts=3, scope=PER_ENTRY)):
        check_step(op, kinds(dtype, grad_dtype=torch.float32, **options), steps=2)


@pytest.mark.parametrize(
    "hyper",
    [
        dict(maximize=True),
        dict(weight_decay=0.0, eps=1e-3, beta1=0.0, beta2=0.5),
        dict(lr=9.0, lr_tensor=torch.tensor(0.01)),
        dict(lr=9.0, lr_tensor=torch.tensor([0.01]), grad_scale=torch.tensor(3.0), maximize=True),
        dict(grad_scale=torch.tensor([1024.0]), found_inf=torch.tensor([0.0])),
    ],
)
def test_hyperparameters(op, hyper):
    for dtype, master in [(torch.float32, False), (torch.bfloat16, True), (torch.float64, False)]:
        check_step(op, kinds(dtype, master=master), **hyper)


@pytest.mark.parametrize("found", [1.0, float("nan")])
def test_found_inf_changes_nothing(op, found):
    before = make_problem([*kinds(torch.bfloat16), *kinds(strided=True, cohorts=3, scope=PER_ENTRY)])
    after = before.clone()
    after.step(op, found_inf=torch.tensor(found))
    for old, new in zip([*before.params, *before.states], [*after.params, *after.states], strict=True):
        assert torch.equal(old, new)


def test_random_bits_are_the_reference_s(op):
    for dtype in (torch.bfloat16, torch.float16):
        for options in ({}, dict(cohorts=3, scope=PER_ENTRY), dict(cohorts=3, scope=PER_UNIT)):
            mine = make_problem(kinds(dtype, **options))
            plain = mine.clone()
            mine.step(op)
            plain.step(reference.masked_adamw_)
            assert min(same_random_bits(mine, plain, i) for i in range(len(mine.params))) > 0.995


def test_several_chunks_and_odd_densities(op):
    """More than one chunk a task, rows that straddle chunks, element blocks that are full, empty or in part there."""
    check_step(
        op,
        [
            Case(shape=(4099,)),
            Case(kind=ROWS, shape=(5, 3001), density=0.8),
            Case(kind=ROWS, shape=(9, 4096), density=0.8, dtype=torch.bfloat16, master=True),
            Case(kind=ROWS, shape=(6000, 1), density=0.9, gain=True, cohorts=255, scope=PER_UNIT),
            Case(kind=ELEMENTS, shape=(40961,), density=0.3),
            Case(kind=ELEMENTS, shape=(7, 2500), density=1.0, cohorts=16, scope=PER_ENTRY),
            Case(kind=ELEMENTS, shape=(300, 300), density=0.001),
            Case(kind=TWO_FOUR, shape=(3, 2004)),
        ],
        steps=3,
    )


def test_tasks_past_one_launch(op):
    cases = [Case(kind=kind, shape=(3, 4)) for kind in (DENSE, ROWS, ELEMENTS, TWO_FOUR) for _ in range(90)]
    launches = op.launches
    check_step(op, cases)
    assert op.launches == launches + 2


def test_parameters_without_active_entries(op):
    none = [Case(kind=kind, shape=(8, 12), density=0.0) for kind in (ROWS, ELEMENTS)] + [Case(shape=(0, 3))]
    launches = op.launches
    check_step(op, none)
    check_step(op, [])
    assert op.launches == launches
    check_step(op, [*none, Case(), *none])


def test_repeats_to_the_bit(op):
    problems = [make_problem(kinds(torch.bfloat16, cohorts=2, scope=PER_ENTRY)) for _ in range(2)]
    for problem in problems:
        problem.step(op)
    for first, second in zip(*(p.params + p.states for p in problems), strict=True):
        assert torch.equal(first, second)


def test_nan_and_inf_gradients_stay_with_their_entries(op):
    for case in kinds():
        problem = make_problem([case])
        where = problem.positions(0)[::3]
        problem.grads[0].view(-1)[where] = torch.tensor([float("nan"), float("inf")]).repeat(len(where))[: len(where)]
        before = problem.clone()
        problem.step(op)
        bad = problem.params[0].isnan().view(-1)
        assert bad[where].all() and bad.sum() == len(where)
        assert torch.equal(before.views(0)["step"] + 1, problem.views(0)["step"])


def test_addresses_and_undefined_behaviour():
    """A smaller run of this file with every access checked."""
    asan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(asan).is_absolute():
        pytest.skip("needs libasan")
    library = build("-O1", "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined")
    environment = os.environ | dict(
        LD_PRELOAD=asan, ASAN_OPTIONS="detect_leaks=0", SPARSE_CL_EMULATED=str(library), OMP_NUM_THREADS="1"
    )
    chosen = "several_chunks or float32_gradients or (oracle and plain and not fp64) or without_active"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
