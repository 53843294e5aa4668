"""What the methods of sparse_cl are measured against, and the tools that measure: baselines, bounds, comparisons."""

from sparse_cl.methods.registry import register

from .bounds import Joint, Single
from .ewc import EWC
from .freeze_lower import FreezeLower
from .lora_wd import LoRAWeightDecay
from .migu import MIGU
from .mofo import MoFO
from .o_lora import OLoRA
from .osf import OSF

for _method in (LoRAWeightDecay, FreezeLower, EWC, MoFO, MIGU, OLoRA, OSF, Single, Joint):
    register(_method)

__all__ = ["EWC", "FreezeLower", "Joint", "LoRAWeightDecay", "MIGU", "MoFO", "OLoRA", "OSF", "Single"]
