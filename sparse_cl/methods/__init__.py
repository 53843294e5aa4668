"""Continual-learning methods: which parameters a new domain may change, and by which optimizer."""

from __future__ import annotations

from .adamw import AdamW
from .base import Batch, Method
from .lora import LoRA
from .orthogonal import Orthogonal, OrthogonalLoRA
from .orthogonal_masked import OrthogonalMasked
from .selective_write import SelectiveWrite
from .sparse_masked import SparseMasked
from .sparse_masked_lora import SparseMaskedLoRA

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        AdamW,
        LoRA,
        SparseMasked,
        SparseMaskedLoRA,
        SelectiveWrite,
        Orthogonal,
        OrthogonalLoRA,
        OrthogonalMasked,
    )
}
"""Every method by the name that `--method` takes."""

__all__ = [
    "METHODS",
    "AdamW",
    "Batch",
    "LoRA",
    "Method",
    "Orthogonal",
    "OrthogonalLoRA",
    "OrthogonalMasked",
    "SelectiveWrite",
    "SparseMasked",
    "SparseMaskedLoRA",
]
