"""What was built, and what of it runs."""

from __future__ import annotations

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
        from sparse_cl._build_info import built
    except ModuleNotFoundError:
        names = ("cpu_levels", "cpu_level", "cuda_architectures", "torch_target", "compiler")
        info: dict[str, Any] = dict.fromkeys(names)
    else:
        info = built()
        for name in ("cpu_levels", "cuda_architectures"):
            info[name] = info[name].split()
    info["runs"] = {device: "native" if loaded else "reference" for device, loaded in LOADED.items()}
    return info
