"""What nvcc makes of every .cu, for each architecture: no warnings, no spills, few registers, wide accesses. No GPU."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
ARCHITECTURES = (80, 90, 100)

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def built(source: Path) -> tuple[Path, str]:
    """The object file of a source and what nvcc and ptxas say of it, kept for each state of csrc."""
    command = [
        *("nvcc", "-std=c++17", "-O3", "--fmad=false", "--threads", "2", "-c", str(source)),
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
        log.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([*command, "-o", str(log.with_suffix(".o"))], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        log.write_text(done.stdout + done.stderr)
    return log.with_suffix(".o"), log.read_text()


SOURCES = {path.stem: path for path in sorted((ROOT / "csrc").glob("*.cu"))}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_compiles_without_warning_or_spill(source):
    _, log = built(source)
    assert "warning" not in log, log
    compiled = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", log)
    assert {int(a) for _, a in compiled} == set(ARCHITECTURES)
    for kind in ("stack frame", "spill stores", "spill loads"):
        sizes = [int(size) for size in re.findall(rf"(\d+) bytes {kind}", log)]
        assert len(sizes) >= len(compiled) and not any(sizes), log


def is_float64(kernel: str) -> bool:
    """Whether a mangled kernel name is of float64 parameters or gradients, or of the projector's float64 factors."""
    return "kernelId" in kernel or "gram_factor" in kernel


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_three_blocks_fit_a_multiprocessor(source):
    """65,536 registers hold three blocks of 256 threads of at most 80 each (they come in eights)."""
    _, log = built(source)
    used = re.findall(r"entry function '(\w+)' for 'sm_(\d+)'.*?Used (\d+) registers", log, re.DOTALL)
    assert len(used) == log.count("Compiling entry function")
    assert not [row for row in used if not is_float64(row[0]) and int(row[2]) > 80]


def instructions(object_file: Path) -> dict[tuple[str, str], Counter]:
    """Accesses to memory of each kernel and architecture: how many there are of each width, from SASS."""
    tool = shutil.which("cuobjdump")
    packaged = [Path(folder) / "nvidia" / "cu13" / "bin" for folder in sys.path]
    folder = Path(tool).parent if tool else next((f for f in packaged if (f / "cuobjdump").exists()), None)
    if folder is None:
        pytest.skip("needs cuobjdump: it is in the CUDA toolkit, and in the package nvidia-cuda-cuobjdump")
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = [str(folder / "cuobjdump"), "-sass", str(object_file)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    result = {}
    for part in re.split(r"arch = sm_", sass)[1:]:
        architecture = re.match(r"\d+", part)[0]
        for function in part.split("Function : ")[1:]:
            name = function.split()[0]
            accesses = re.findall(r"\b(LD|ST)G?\.E(?:\.\w+)*?\.(128|64)\b", function)
            result[name, architecture] = Counter(f"{op}.{width}" for op, width in accesses)
    return result


#: Of a step of float32 parameters: weight, master, gradient and both moments; of half-precision ones, whose wide
#: accesses to weights and gradients are half as wide; and of added updates.
WIDE = {
    "IffLNS_4ModeE0": {"LD.128": 5, "ST.128": 4},
    "IffLNS_4ModeE1": {"LD.128": 6, "ST.128": 5},
    "IffLNS_4ModeE2": {"LD.128": 3, "ST.128": 2},
    "Float16ES1_LNS_4ModeE0": {"LD.128": 3, "LD.64": 2, "ST.128": 3, "ST.64": 1},
    "Float16ES1_LNS_4ModeE1": {"LD.128": 4, "LD.64": 2, "ST.128": 4, "ST.64": 1},
    "Float16EfLNS_4ModeE0": {"LD.128": 4, "LD.64": 1, "ST.128": 3, "ST.64": 1},
    "Float16EfLNS_4ModeE2": {"LD.128": 2, "LD.64": 1, "ST.128": 1, "ST.64": 1},
}


@pytest.mark.parametrize("kernel", WIDE)
def test_steps_keep_their_wide_accesses(kernel):
    found = {k: c for k, c in instructions(built(SOURCES["masked_adamw"])[0]).items() if kernel in k[0]}
    # BFloat16 ends as Float16 does.
    assert len(found) == len(ARCHITECTURES) * (2 if "Float16" in kernel else 1), list(found)
    for which, accesses in found.items():
        assert all(accesses[access] >= least for access, least in WIDE[kernel].items()), (which, accesses)


@pytest.mark.parametrize("kernel", ["active_norm_kernel", "scale_active_kernel"])
def test_clipping_keeps_its_wide_accesses(kernel):
    found = {k: c for k, c in instructions(built(SOURCES["clip_grad"])[0]).items() if kernel in k[0]}
    assert len(found) == len(ARCHITECTURES) * 4
    for which, accesses in found.items():
        assert accesses["LD.128"] >= 4, (which, accesses)


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
