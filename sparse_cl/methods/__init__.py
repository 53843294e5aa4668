"""Continual-learning methods: which parameters a new domain may change, and by which optimizer."""

from __future__ import annotations

from .adamw import AdamW
from .base import Batch, Method
from .carried import Carried, load_carried, save_carried
from .curvature import Curvature
from .elastic import Elastic, ElasticLoRA
from .lora import LoRA
from .orthogonal import Orthogonal, OrthogonalLoRA
from .orthogonal_masked import OrthogonalMasked
from .registry import METHODS, join_arena, method_named, register
from .replay import Replay1, Replay5
from .routed import Routed
from .selective_write import SelectiveWrite
from .sparse_masked import SparseMasked
from .sparse_masked_lora import SparseMaskedLoRA
from .two_four import TwoFour

for _method in (
    AdamW,
    LoRA,
    Replay1,
    Replay5,
    SparseMasked,
    SparseMaskedLoRA,
    SelectiveWrite,
    Orthogonal,
    OrthogonalLoRA,
    OrthogonalMasked,
    Elastic,
    ElasticLoRA,
    TwoFour,
    Routed,
    Curvature,
):
    register(_method)
join_arena()

__all__ = [
    "AdamW",
    "Batch",
    "Carried",
    "Curvature",
    "Elastic",
    "ElasticLoRA",
    "LoRA",
    "METHODS",
    "Method",
    "Orthogonal",
    "OrthogonalLoRA",
    "OrthogonalMasked",
    "Replay1",
    "Replay5",
    "Routed",
    "SelectiveWrite",
    "SparseMasked",
    "SparseMaskedLoRA",
    "TwoFour",
    "load_carried",
    "method_named",
    "register",
    "save_carried",
]
