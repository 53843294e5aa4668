"""Schemas, fakes and the native libraries. The only file that says ``torch.ops.sparse_cl``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_cl import reference

_LIBRARY_FOLDER = Path(__file__).parent / "lib"

_library = torch.library.Library("sparse_cl", "DEF")


def _define(schema: str, implementation: Callable, fake: Callable) -> Any:
    """Defines an op with its reference, which a native kernel outranks on its device once it is loaded."""
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparse_cl::{name}", fake, lib=_library)
    return getattr(torch.ops.sparse_cl, name).default


def _nothing(*args: Any) -> None:
    """The fake of an op that returns nothing."""


def _active_norm_fake(grads: Sequence[Tensor], states: Sequence[Tensor], layout: Tensor) -> Tensor:
    return (grads[0] if grads else layout).new_empty((), dtype=reference.norm_dtype(grads))


def _gram_factor_fake(gram: Tensor, squared_norms: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    return gram.new_empty(gram.shape, dtype=torch.float64), gram.new_empty(gram.shape[:-2], dtype=torch.int64)


masked_adamw_ = _define(
    "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] updates, Tensor layout, "
    "float lr, Tensor? lr_tensor, float beta1, float beta2, float eps, float weight_decay, bool maximize, "
    "Tensor? grad_scale, Tensor? found_inf) -> ()",
    reference.masked_adamw_,
    _nothing,
)
apply_updates_ = _define(
    "apply_updates_(Tensor(a!)[] params, Tensor(b!)[] states, Tensor[] updates, Tensor layout, Tensor? found_inf) "
    "-> ()",
    reference.apply_updates_,
    _nothing,
)
active_norm = _define(
    "active_norm(Tensor[] grads, Tensor[] states, Tensor layout) -> Tensor", reference.active_norm, _active_norm_fake
)
scale_active_ = _define(
    "scale_active_(Tensor(a!)[] grads, Tensor[] states, Tensor layout, Tensor factor) -> ()",
    reference.scale_active_,
    _nothing,
)
gram_factor = _define(
    "gram_factor(Tensor gram, Tensor squared_norms, float rtol) -> (Tensor factor, Tensor rank)",
    reference.gram_factor,
    _gram_factor_fake,
)


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
