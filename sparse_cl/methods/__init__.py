"""Continual-learning methods: which parameters a new domain may change, and by which optimizer."""

from __future__ import annotations

from .adamw import AdamW
from .base import Batch, Method
from .lora import LoRA
from .orthogonal import Orthogonal, OrthogonalLoRA
from .sparse_masked import SparseMasked

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (AdamW, LoRA, SparseMasked, Orthogonal, OrthogonalLoRA)
}
"""Every method by the name that `--method` takes."""

__all__ = ["METHODS", "AdamW", "Batch", "LoRA", "Method", "Orthogonal", "OrthogonalLoRA", "SparseMasked"]
