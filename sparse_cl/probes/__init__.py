"""Probes: what domains use of a model, what they share, and what is free. They need torch alone."""

from sparse_cl.models.parts import find_attentions, find_blocks, find_mlps, linear_layers
from sparse_cl.models.passes import Watch, stream

from .activation import ActivationProbe
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
from .scaling import fit_exponent
from .scores import ActivationScores
from .smearing import smearing

__all__ = [
    "ActivationProbe",
    "ActivationScores",
    "Capacity",
    "CurvatureProbe",
    "FeatureProbe",
    "GradientProbe",
    "InputProbe",
    "MeanGradient",
    "Watch",
    "agreement",
    "capacity",
    "compare_gradients",
    "connectivity",
    "critical_sparsity",
    "curvature_overlap",
    "dormant",
    "drift",
    "effective_rank",
    "find_attentions",
    "find_blocks",
    "find_mlps",
    "fit_exponent",
    "forecast",
    "hubs",
    "interference",
    "linear_layers",
    "overlap",
    "plasticity",
    "smearing",
    "stable_rank",
    "steps_to_fit",
    "stream",
    "update_rank",
    "weight_hubs",
]
