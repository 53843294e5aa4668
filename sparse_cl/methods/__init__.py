"""Continual-learning methods: which parameters a new domain may change, and by which optimizer."""

from __future__ import annotations

from .adamw import AdamW
from .base import Batch, Method
from .bounds import Joint, Single
from .curvature import Curvature
from .elastic import Elastic, ElasticLoRA
from .ewc import EWC
from .freeze_lower import FreezeLower
from .lora import LoRA, LoRAWeightDecay
from .migu import MIGU
from .mofo import MoFO
from .o_lora import OLoRA
from .orthogonal import Orthogonal, OrthogonalLoRA
from .orthogonal_masked import OrthogonalMasked
from .osf import OSF
from .replay import Replay1, Replay5
from .selective_write import SelectiveWrite
from .sparse_masked import SparseMasked
from .sparse_masked_lora import SparseMaskedLoRA
from .two_four import TwoFour

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        AdamW,
        LoRA,
        LoRAWeightDecay,
        FreezeLower,
        EWC,
        Replay1,
        Replay5,
        MoFO,
        MIGU,
        OLoRA,
        OSF,
        Single,
        Joint,
        SparseMasked,
        SparseMaskedLoRA,
        SelectiveWrite,
        Orthogonal,
        OrthogonalLoRA,
        OrthogonalMasked,
        Elastic,
        ElasticLoRA,
        TwoFour,
        Curvature,
    )
}
"""Every method by the name that `--method` takes."""

__all__ = [
    "AdamW",
    "Batch",
    "Curvature",
    "EWC",
    "Elastic",
    "ElasticLoRA",
    "FreezeLower",
    "Joint",
    "LoRA",
    "LoRAWeightDecay",
    "METHODS",
    "MIGU",
    "Method",
    "MoFO",
    "OLoRA",
    "OSF",
    "Orthogonal",
    "OrthogonalLoRA",
    "OrthogonalMasked",
    "Replay1",
    "Replay5",
    "SelectiveWrite",
    "Single",
    "SparseMasked",
    "SparseMaskedLoRA",
    "TwoFour",
]
