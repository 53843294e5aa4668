"""Schemas, fakes and the native libraries. The only file that says ``torch.ops``."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sparse_cl import reference

_LIBRARY_FOLDER = Path(__file__).parent / "lib"

_library = torch.library.Library("sparse_cl", "DEF")
_library.define(
    "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor layout, float lr, "
    "Tensor? lr_tensor, float beta1, float beta2, float eps, float weight_decay, bool maximize, "
    "Tensor? grad_scale, Tensor? found_inf) -> ()"
)
_library.impl("masked_adamw_", reference.masked_adamw_, "CompositeExplicitAutograd")
torch.library.register_fake("sparse_cl::masked_adamw_", lambda *args: None, lib=_library)


def _load(name: str, wanted: bool) -> bool:
    path = _LIBRARY_FOLDER / f"lib{name}.so"
    if not wanted or not path.exists():
        return False
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"{path} is there but does not load ({error}). Build it again with `pip install -e .`, "
            "or set SPARSE_CL_REFERENCE=1 to run the plain PyTorch reference"
        ) from error
    return True


_native = os.environ.get("SPARSE_CL_REFERENCE", "0") in ("", "0")

#: Which native libraries were loaded; where one is False, the reference runs on that device.
LOADED = {
    "cpu": _load("sparse_cl_cpu", _native),
    "cuda": _load("sparse_cl_cuda", _native and torch.version.cuda is not None),
}

masked_adamw_ = torch.ops.sparse_cl.masked_adamw_.default
