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
from .orthonormalize import default_rtol, orthonormalize
from .project_out import project_onto_, project_out_
from .randomized_svd import randomized_svd

__all__ = [
    "active_norm",
    "active_positions",
    "apply_updates_",
    "block_ranks",
    "default_rtol",
    "gram_factor",
    "masked_adamw_",
    "norm_dtype",
    "orthonormalize",
    "pack_bits",
    "project_onto_",
    "project_out_",
    "random_bits",
    "randomized_svd",
    "scale_active_",
    "spread_units",
    "stochastic_round",
    "unpack_bits",
]
