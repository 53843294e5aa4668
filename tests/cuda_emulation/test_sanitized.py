"""The emulated kernels once more, on fewer problems, with every address and all undefined behaviour checked."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulation.emulated import build

FLAGS = "-O0 -g -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"
#: Of each .cu, the tests that run.
CHOSEN = {
    "masked_adamw": "several_chunks or float32_gradients or without_active or "
    "(oracle and ((plain and not fp64) or (by-row-gain and fp32)))",
    "clip_grad": "several_chunks or float32_gradients or (count and (plain or misaligned)) or nothing",
    "gram_factor": "one or odd or batch or some_zero or duplicates or past or finite",
}


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_addresses_and_undefined_behaviour(monkeypatch):
    asan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(asan).is_absolute():
        pytest.skip("needs libasan")
    monkeypatch.setenv("SPARSE_CL_EMULATED_FLAGS", FLAGS)
    for name in CHOSEN:
        build(name)
    files = [Path(__file__).parents[1] / "ops" / f"test_{name}_cuda_emulated.py" for name in CHOSEN]
    chosen = " or ".join(f"({name} and ({tests}))" for name, tests in CHOSEN.items())
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *files, "-k", chosen]
    environment = os.environ | dict(LD_PRELOAD=asan, ASAN_OPTIONS="detect_leaks=0", OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
