"""Every .cu compiles for each architecture without a warning or a spill, wherever nvcc is; no GPU is needed."""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
ARCHITECTURES = (80, 90, 100)

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def compile_log(source: Path) -> str:
    """What nvcc and ptxas say of a source; kept for each state of csrc, since three architectures take a while."""
    command = [
        *("nvcc", "-std=c++17", "-O3", "--fmad=false", "--threads", "2", "-c", str(source), "-o", "/dev/null"),
        *("-isystem", str(Path(torch.__file__).parent / "include")),
        *("-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-DUSE_CUDA"),
        *("-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror,-fPIC"),
        *("-Xptxas", "-v,-warn-spills,-warn-lmem-usage"),
        *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES),
    ]
    key = hashlib.sha256(" ".join([*command, torch.__version__]).encode())
    key.update(subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout)
    for file in sorted([*(ROOT / "csrc").glob("*.cu*"), *(ROOT / "csrc").glob("*.h")]):
        key.update(file.read_bytes())
    log = ROOT / "build" / "cuda_build" / f"{source.stem}-{key.hexdigest()[:16]}.log"
    if not log.exists():
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stdout + done.stderr)
    return log.read_text()


@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("*.cu")), ids=lambda path: path.stem)
def test_compiles_without_warning_or_spill(source):
    log = compile_log(source)
    assert "warning" not in log, log
    compiled = re.findall(r"Compiling entry function '\w+' for 'sm_(\d+)'", log)
    assert {int(a) for a in compiled} == set(ARCHITECTURES)
    for kind in ("stack frame", "spill stores", "spill loads"):
        sizes = [int(size) for size in re.findall(rf"(\d+) bytes {kind}", log)]
        assert len(sizes) >= len(compiled) and not any(sizes), log


LOAD = """
import ctypes, sys, torch
from sparse_cl import ops
ctypes.CDLL(sys.argv[1])
torch.ops.load_library(sys.argv[2])
for name in ("masked_adamw_", "active_norm", "scale_active_", "gram_factor"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sparse_cl::{name}", "CUDA"), name
"""


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA; elsewhere importing tests this")
def test_library_loads_where_torch_has_cuda(tmp_path):
    """A stand-in takes the place of libtorch_cuda, its symbols as little global as torch's own."""
    library = ROOT / "sparse_cl" / "lib" / "libsparse_cl_cuda.so"
    if not library.exists():
        pytest.skip("needs the CUDA library")
    source, stand_in = tmp_path / "stand_in.cpp", tmp_path / "libtorch_cuda.so"
    source.write_text('extern "C" int aoti_torch_get_current_cuda_stream() { return 1; }')
    subprocess.run(
        ["g++", "-shared", "-fPIC", str(source), "-Wl,-soname,libtorch_cuda.so", "-o", str(stand_in)], check=True
    )
    command = [sys.executable, "-c", LOAD, str(stand_in), str(library)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
