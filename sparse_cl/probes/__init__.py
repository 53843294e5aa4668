"""Probes: what domains use of a model, what they share, and what is free. They need torch alone.

Blocks, MLPs, attentions and the passes that probes watch are in :mod:`sparse_cl.models`.
"""

import warnings
from typing import Any

from sparse_cl import models

from .activation import ActivationProbe
from .boundaries import BoundaryDetector
from .capacity import Capacity, capacity, forecast
from .connectivity import connectivity
from .critical_sparsity import critical_sparsity
from .curvature import CurvatureProbe, curvature_overlap
from .drift import drift
from .features import FeatureProbe
from .gradient_cosines import compare_gradients
from .gradients import GradientProbe, MeanGradient
from .inputs import InputProbe
from .interference import interference
from .neurons import agreement, dormant, hubs, weight_hubs
from .overlap import overlap
from .plasticity import plasticity, steps_to_fit
from .rank import effective_rank, stable_rank, update_rank
from .routing import choices, overlaps
from .scaling import fit_exponent
from .scores import ActivationScores
from .shared_forgetting import shared_forgetting
from .smearing import smearing
from .superposition import superposition
from .waking import waking

__all__ = [
    "ActivationProbe",
    "ActivationScores",
    "BoundaryDetector",
    "Capacity",
    "CurvatureProbe",
    "FeatureProbe",
    "GradientProbe",
    "InputProbe",
    "MeanGradient",
    "agreement",
    "capacity",
    "choices",
    "compare_gradients",
    "connectivity",
    "critical_sparsity",
    "curvature_overlap",
    "dormant",
    "drift",
    "effective_rank",
    "fit_exponent",
    "forecast",
    "hubs",
    "interference",
    "overlap",
    "overlaps",
    "plasticity",
    "shared_forgetting",
    "smearing",
    "stable_rank",
    "steps_to_fit",
    "superposition",
    "update_rank",
    "waking",
    "weight_hubs",
]

_MOVED_TO_MODELS = ("Watch", "find_attentions", "find_blocks", "find_mlps", "linear_layers", "stream")


def __getattr__(name: str) -> Any:
    """Names that moved in 0.2, until 0.3."""
    if name not in _MOVED_TO_MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"sparse_cl.probes.{name} has moved; import sparse_cl.models.{name}. The old name goes in sparse_cl 0.3",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(models, name)
