"""Every op in plain PyTorch: the fallback where no native library is built, and the oracle of the tests."""

from .apply_updates import apply_updates_
from .clip_grad import active_norm, norm_dtype, scale_active_
from .gram_factor import gram_factor
from .masked_adamw import (
    active_positions,
    block_ranks,
    masked_adamw_,
    pack_bits,
    random_bits,
    spread_units,
    stochastic_round,
    unpack_bits,
)

__all__ = [
    "active_norm",
    "active_positions",
    "apply_updates_",
    "block_ranks",
    "gram_factor",
    "masked_adamw_",
    "norm_dtype",
    "pack_bits",
    "random_bits",
    "scale_active_",
    "spread_units",
    "stochastic_round",
    "unpack_bits",
]
