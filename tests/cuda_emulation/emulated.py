"""Compiles a .cu of csrc for the CPU, on emulated CUDA threads, and makes an op of it."""

import hashlib
import os
import subprocess
from collections.abc import Callable
from ctypes import CDLL, c_int64
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "csrc").glob("*.[hc]*"), *Path(__file__).parent.glob("*.[hc]*")])

_definition = torch.library.Library("sparse_cl_emulated", "DEF")


def build(name: str) -> Path:
    """The emulated library of ``csrc/<name>.cu``, built once for each state of its sources.

    ``SPARSE_CL_EMULATED_FLAGS``: further flags of the compiler.
    """
    torch_folder = Path(torch.__file__).parent
    command = [
        *(
            "g++",
            "-std=c++17",
            "-O1",
            "-shared",
            "-fPIC",
            "-Wl,-Bsymbolic",  # its own stand-ins of what torch exports
            "-pthread",
            "-fvisibility=hidden",
            "-fno-strict-aliasing",
        ),
        *("-Wall", "-Werror", "-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-DUSE_CUDA"),
        "-DSPARSE_CL_CUDA_THREADS=64",  # a barrier costs a context switch a thread
        f'-DSPARSE_CL_EMULATED_SOURCE="{ROOT / "csrc" / f"{name}.cu"}"',
        *("-I", str(Path(__file__).parent), "-isystem", str(torch_folder / "include")),
        *os.environ.get("SPARSE_CL_EMULATED_FLAGS", "").split(),
        str(Path(__file__).parent / "emulated_op.cpp"),
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
    """An emulated op, and how often it launched a kernel."""

    def __init__(self, op: torch._ops.OpOverload, library: Path):
        schema = str(op._schema).removeprefix("sparse_cl::")
        _definition.define(schema)
        torch.ops.load_library(library)
        self._op = getattr(torch.ops.sparse_cl_emulated, schema.split("(")[0])
        self._library = CDLL(str(library))

    def __call__(self, *args):
        return self._op(*args)

    @property
    def launches(self) -> int:
        return self._library.emulated_launches()

    def bytes_moved(self, call: Callable[[], None]) -> int:
        """Bytes of the 32-byte sectors that each warp access of ``call``'s kernels touches."""
        self._library.emulated_count_bytes()
        call()
        moved = self._library.emulated_bytes_moved
        moved.restype = c_int64
        return moved()
