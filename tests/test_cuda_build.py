"""What nvcc made of every .cu, for each architecture: no spills, few registers, wide accesses. No GPU.

The build of the Makefile lets no warning pass. What is read is the library in the tree, which must be of its sources.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "sparse_cl" / "lib" / "libsparse_cl_cuda.so"
ARCHITECTURES = (80, 90, 100)
KERNELS = (
    "masked_adamw_kernel",
    "row_moments_kernel",
    "active_norm_kernel",
    "scale_active_kernel",
    "gram_factor_kernel",
)

nvcc = shutil.which("nvcc") is not None and os.environ.get("SPARSE_CL_CUDA") != "0"
pytestmark = pytest.mark.skipif(not (nvcc or LIBRARY.exists()), reason="needs nvcc, or the CUDA library")


@cache
def cuobjdump(what: str) -> dict[tuple[str, int], str]:
    """What it says of each kernel and architecture of the library."""
    tool = shutil.which("cuobjdump")
    packaged = [Path(folder) / "nvidia" / "cu13" / "bin" for folder in sys.path]
    folder = Path(tool).parent if tool else next((f for f in packaged if (f / "cuobjdump").exists()), None)
    if folder is None:
        pytest.skip("needs cuobjdump: it is in the CUDA toolkit, and in the package nvidia-cuda-cuobjdump")
    assert LIBRARY.exists(), f"there is nvcc, but no {LIBRARY}: build it, or say SPARSE_CL_CUDA=0"
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = [str(folder / "cuobjdump"), what, str(LIBRARY)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    found = {}
    for part in re.split(r"arch = sm_", text)[1:]:
        architecture = int(re.match(r"\d+", part)[0])
        for function in re.split(r"Function ?:? ", part)[1:]:
            if architecture in ARCHITECTURES:
                found[re.match(r"\w+", function)[0], architecture] = function
    return found


def included(source: Path) -> set[Path]:
    """A source and the files of its folder that it includes, also by others."""
    names = re.findall(r'#include "([^"]+)"', source.read_text())
    return {source}.union(*(included(source.parent / name) for name in names))


def test_the_library_is_of_these_sources():
    sources = set().union(*map(included, (ROOT / "csrc").glob("*.cu")))
    newer = [path.name for path in sources if path.stat().st_mtime > LIBRARY.stat().st_mtime]
    assert not newer, f"{LIBRARY} is older than {newer}: build it again"


def test_every_kernel_is_there_for_every_architecture():
    found = {(kernel, a) for name, a in cuobjdump("-res-usage") for kernel in KERNELS if kernel in name}
    missing = {(kernel, a) for kernel in KERNELS for a in ARCHITECTURES} - found
    assert not missing, f"{LIBRARY} was built for other architectures: build it again"
    kernels = [{name for name, a in cuobjdump("-res-usage") if a == architecture} for architecture in ARCHITECTURES]
    assert kernels[0] == kernels[1] == kernels[2]


def usage(kind: str) -> dict[tuple[str, int], int]:
    return {which: int(re.search(rf"\b{kind}:(\d+)", text)[1]) for which, text in cuobjdump("-res-usage").items()}


@pytest.mark.parametrize("kind", ["STACK", "LOCAL"])
def test_no_stack_and_no_spills(kind):
    """Spilled registers are part of the stack."""
    assert not [which for which, size in usage(kind).items() if size]


def is_float64(kernel: str) -> bool:
    """Whether a mangled kernel name is of float64 parameters or gradients, or of the projector's float64 factors."""
    return "kernelId" in kernel or "gram_factor" in kernel


def test_three_blocks_fit_a_multiprocessor():
    """65,536 registers hold three blocks of 256 threads of at most 80 each (they come in eights)."""
    assert not [which for which, used in usage("REG").items() if not is_float64(which[0]) and used > 80]


@cache
def accesses() -> dict[tuple[str, int], Counter]:
    """Accesses to memory of each kernel and architecture: how many there are of each width, from SASS."""
    wide = re.compile(r"\b(LD|ST)G?\.E(?:\.\w+)*?\.(128|64)\b")
    return {which: Counter(map(".".join, wide.findall(text))) for which, text in cuobjdump("-sass").items()}


#: Of a step of float32 parameters: weight, master, gradient and both moments, of which one is of rows in mode 2; of
#: half-precision ones, whose wide accesses to weights and gradients are half as wide; and of added updates.
WIDE = {
    "IffLNS_4ModeE0": {"LD.128": 5, "ST.128": 4},
    "IffLNS_4ModeE1": {"LD.128": 6, "ST.128": 5},
    "IffLNS_4ModeE2": {"LD.128": 4, "ST.128": 3},
    "IffLNS_4ModeE3": {"LD.128": 3, "ST.128": 2},
    "Float16ES1_LNS_4ModeE0": {"LD.128": 3, "LD.64": 2, "ST.128": 3, "ST.64": 1},
    "Float16ES1_LNS_4ModeE1": {"LD.128": 4, "LD.64": 2, "ST.128": 4, "ST.64": 1},
    "Float16EfLNS_4ModeE0": {"LD.128": 4, "LD.64": 1, "ST.128": 3, "ST.64": 1},
    "Float16EfLNS_4ModeE2": {"LD.128": 3, "LD.64": 1, "ST.128": 2, "ST.64": 1},
    "Float16EfLNS_4ModeE3": {"LD.128": 2, "LD.64": 1, "ST.128": 1, "ST.64": 1},
}


@pytest.mark.parametrize("kernel", WIDE)
def test_steps_keep_their_wide_accesses(kernel):
    found = {k: c for k, c in accesses().items() if kernel in k[0]}
    # BFloat16 ends as Float16 does.
    assert len(found) == len(ARCHITECTURES) * (2 if "Float16" in kernel else 1), list(found)
    for which, widths in found.items():
        assert all(widths[width] >= least for width, least in WIDE[kernel].items()), (which, widths)


@pytest.mark.parametrize("kernel, least", [("active_norm_kernel", 4), ("scale_active_kernel", 4), ("row_moments", 1)])
def test_clipping_and_moments_of_rows_keep_their_wide_accesses(kernel, least):
    found = {k: c for k, c in accesses().items() if kernel in k[0]}
    assert len(found) == len(ARCHITECTURES) * (7 if kernel == "row_moments" else 4)
    for which, widths in found.items():
        assert widths["LD.128"] >= least, (which, widths)


LOAD = """
import ctypes, sys, torch
from sparse_cl import ops
ctypes.CDLL(sys.argv[1])
torch.ops.load_library(sys.argv[2])
for name in ("masked_adamw_", "apply_updates_", "active_norm", "scale_active_", "gram_factor"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sparse_cl::{name}", "CUDA"), name
"""


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA; elsewhere importing tests this")
def test_library_loads_where_torch_has_cuda(tmp_path):
    """A stand-in takes the place of libtorch_cuda, its symbols as little global as torch's own."""
    source, stand_in = tmp_path / "stand_in.cpp", tmp_path / "libtorch_cuda.so"
    source.write_text('extern "C" int aoti_torch_get_current_cuda_stream() { return 1; }')
    subprocess.run(
        ["g++", "-shared", "-fPIC", str(source), "-Wl,-soname,libtorch_cuda.so", "-o", str(stand_in)], check=True
    )
    command = [sys.executable, "-c", LOAD, str(stand_in), str(LIBRARY)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
