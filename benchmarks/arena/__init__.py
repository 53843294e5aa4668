"""What the methods of sparse_cl are measured against, and the tools that measure: baselines, bounds, comparisons."""

from sparse_cl.methods.registry import register

from .averaging import SFA, LoRAMean
from .bounds import Joint, Single
from .early_stopping import EarlyStopping
from .ewc import EWC
from .freeze_lower import FreezeLower
from .lora_wd import LoRAWeightDecay
from .migu import MIGU
from .mofo import MoFO
from .nulls import ElasticNull
from .o_lora import OLoRA
from .osf import OSF
from .osft import OSFT
from .self_replay import SelfReplay
from .soap import SOAPMethod
from .springs import L2SP, KFACLaplace, KFACRows

_BASELINES = (LoRAWeightDecay, FreezeLower, EarlyStopping, EWC, MoFO, MIGU, OLoRA, OSF)
_BASELINES += (OSFT, SFA, LoRAMean, L2SP, KFACLaplace, KFACRows, SOAPMethod, SelfReplay, ElasticNull)
for _method in (*_BASELINES, Single, Joint):
    register(_method)

__all__ = [
    "EWC",
    "MIGU",
    "OSF",
    "OSFT",
    "SFA",
    "EarlyStopping",
    "ElasticNull",
    "FreezeLower",
    "Joint",
    "KFACLaplace",
    "KFACRows",
    "L2SP",
    "LoRAMean",
    "LoRAWeightDecay",
    "MoFO",
    "OLoRA",
    "SOAPMethod",
    "SelfReplay",
    "Single",
]
