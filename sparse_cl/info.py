"""What was built, and what of it runs."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from sparse_cl.ops import LOADED


def build_info() -> dict[str, Any]:
    """Says which code runs, so that a fallback is never silent.

    Returns:
        ``runs``: for ``"cpu"`` and ``"cuda"``, ``"native"`` or ``"reference"`` (plain PyTorch);
        ``cpu_levels``: instruction sets that were built, ``cpu_level``: the one this machine uses, but for dense and
        row-masked float32 on AMD's Zen 4, which avx2 serves where this says avx512;
        ``cuda_architectures``: compiled for, empty without a CUDA library; ``torch_target``: oldest torch that the
        libraries load on; ``compiler``. All but ``runs`` are None where nothing was built.
    """
    try:
        from sparse_cl._build_info import built  # type: ignore[import-not-found]  # exists where it was built
    except ModuleNotFoundError:
        names = ("cpu_levels", "cpu_level", "cuda_architectures", "torch_target", "compiler")
        info: dict[str, Any] = dict.fromkeys(names)
    else:
        info = built()
        for name in ("cpu_levels", "cuda_architectures"):
            info[name] = info[name].split()
    info["runs"] = {device: "native" if loaded else "reference" for device, loaded in LOADED.items()}
    return info


def _warn_if_unbuilt_tree_hides_build() -> None:
    """Python started in a clone imports the clone, built or not, before what ``pip install .`` installed."""
    if LOADED["cpu"] or os.environ.get("SPARSE_CL_REFERENCE", "0") not in ("", "0"):
        return
    here = Path(__file__).parent
    for folder in (Path(entry or ".").absolute() / "sparse_cl" for entry in sys.path):
        if folder != here and (folder / "lib" / "libsparse_cl_cpu.so").exists():
            warnings.warn(
                f"sparse_cl was imported from {here}, where nothing is built, so the plain PyTorch reference runs; the "
                f"copy in {folder} has the native libraries. Start Python in another folder, or build this one: "
                "`pip install -e .`",
                RuntimeWarning,
                stacklevel=2,
            )
            return


_warn_if_unbuilt_tree_hides_build()
