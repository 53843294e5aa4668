"""Hub neurons, which every domain uses, and dormant ones, which none does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl.models.neuron_masks import neuron_count, top_neurons
from sparse_cl.models.parts import find_mlps, matrix_of

from .chance import central_interval, common_to_all, iou_interval, iou_of
from .checks import check_domains
from .overlap import group_draws, layer_ranks
from .resampling import reflected_interval, resamples, top_set_interval
from .result import Result, plain
from .scores import ActivationScores

TAUS = (0.0, 0.025, 0.1)
_RESAMPLES = 200


@dataclass(frozen=True)
class LayerHubs:
    """Hubs of one layer of d neurons, K of which are a domain's most active.

    Attributes:
        indices: (n,) int64, ascending: neurons among the K of every domain, by mean |a| without massive activations.
        interval: 95 % of their number, sequences resampled; None where a domain has one group of them only.
        size: K, the most that there could be.
        expected: d (K/d)^domains, what there would be if domains chose their K at random.
        null_interval: 95 % of random choices lie in it, exactly.
        usage: (d,) float64: the lowest, over domains, of a neuron's percentile by mean |a| in the domain, in [0, 1].
    """

    indices: Tensor
    interval: tuple[float, float] | None
    size: int
    expected: float
    null_interval: tuple[int, int]
    usage: Tensor


@dataclass(frozen=True)
class Hubs(Result):
    """Hubs of each layer; `share` is K as a share of its neurons."""

    domains: tuple[str, ...]
    share: float
    layers: Mapping[str, LayerHubs]

    @property
    def indices(self) -> dict[str, Tensor]:
        """Layer → its hubs, (n,) int64."""
        return {name: layer.indices for name, layer in self.layers.items()}

    def tensors(self) -> dict[str, Tensor]:
        """`layer|hubs` and `layer|usage`."""
        found = {f"{name}|hubs": layer.indices for name, layer in self.layers.items()}
        return found | {f"{name}|usage": layer.usage for name, layer in self.layers.items()}

    def to_json(self) -> dict[str, Any]:
        """As plain JSON: domains, share, and for each layer the number of hubs, and what to hold it against."""
        layers = [
            {
                "name": name,
                "neurons": len(layer.usage),
                "k": layer.size,
                "hubs": layer.indices,
                "interval": layer.interval,
                "expected": layer.expected,
                "null_interval": layer.null_interval,
            }
            for name, layer in self.layers.items()
        ]
        return plain({"domains": self.domains, "share": self.share, "layers": layers})


def hubs(
    scores_by_domain: Mapping[str, ActivationScores], share: float = 0.05, *, part: str = "product", seed: int = 0
) -> Hubs:
    """Hub neurons by usage: those in the top share of every domain.

    Args:
        scores_by_domain: at least two domains, of one model.
        share: of a layer's neurons, in (0, 1]; rounded, at least one neuron.

    Raises:
        ValueError: fewer than two domains, or a share out of range.
    """
    check_domains(2, scores_by_domain=scores_by_domain)
    generator = torch.Generator().manual_seed(seed)
    parts = [scores.part(part) for scores in scores_by_domain.values()]
    draws = [group_draws(next(iter(found.values())), _RESAMPLES, generator) for found in parts]
    layers = {}
    for layer, first in parts[0].items():
        width = len(first.top)
        size = neuron_count(share, width)
        ranks = [layer_ranks(found[layer], drawn, generator) for found, drawn in zip(parts, draws, strict=True)]
        last = torch.stack([rank["plain"][0] for rank in ranks]).amax(0)
        common = (last < size).nonzero().flatten()
        interval = None
        if all(rank["drawn"] is not None for rank in ranks):
            drawn = torch.stack([rank["drawn"] for rank in ranks]).amax(0)
            counts = (drawn < size).sum(1).double()
            interval = tuple(top_set_interval(torch.tensor(float(len(common))), counts, 0.0, float(size)).tolist())
        layers[layer] = LayerHubs(
            indices=common,
            interval=interval,
            size=size,
            expected=width * (size / width) ** len(parts),
            null_interval=central_interval(common_to_all(width, size, len(parts))),
            usage=1 - last.double() / max(1, width - 1),
        )
    return Hubs(tuple(scores_by_domain), share, layers)


@dataclass(frozen=True)
class WeightHubs:
    """The neurons with the largest weights, ‖weights into it‖₂ · ‖weights out of it‖₂, of each layer.

    `indices`: layer → (K,) int64, ascending. `norms`: layer → (neurons,) float64, that product.
    """

    share: float
    indices: Mapping[str, Tensor]
    norms: Mapping[str, Tensor]


@torch.no_grad()
def weight_hubs(model: nn.Module, share: float = 0.05) -> WeightHubs:
    """Hub neurons by weight, of a transformer's MLPs. Of a GLU, both rows into a neuron count: gate and up.

    Raises:
        ValueError: a share out of range; no MLP, or one without plain weight matrices.
    """
    norms = {}
    for mlp in find_mlps(model):
        copies = 2 if mlp.layout.stacked else 1
        into = sum(
            matrix_of(layer, name).double().square().sum(1).view(copies, -1).sum(0) for name, layer in mlp.into.items()
        )
        out = matrix_of(mlp.out, mlp.out_name).double().square().sum(0)
        norms[mlp.name] = (into * out).sqrt().cpu()
    return WeightHubs(share, {name: top_neurons(norm, share) for name, norm in norms.items()}, norms)


def agreement(by_usage: Hubs, by_weight: WeightHubs) -> dict[str, dict[str, Any]]:
    """Whether the most used neurons have the largest weights, by layer.

    Returns:
        Layer → iou: of the K neurons with the highest `usage` and the K with the largest weights; null: K / (2d - K);
        null_interval: 95 % of random sets lie in it (hypergeometric law); ceiling: 1; correlation: Spearman's, of
        usage and weights over all neurons.

    Raises:
        ValueError: hubs of different models.
    """
    found = {}
    for name, layer in by_usage.layers.items():
        norm = by_weight.norms.get(name)
        if norm is None or len(norm) != len(layer.usage):
            raise ValueError(
                f"by_weight: expected {len(layer.usage)} neurons in {name}, got "
                f"{'no such layer' if norm is None else len(norm)}; give hubs of one model"
            )
        width, size = len(norm), layer.size
        both = len(set(top_neurons(layer.usage, by_usage.share).tolist()) & set(norm.topk(size).indices.tolist()))
        places = torch.stack([x.argsort().argsort().double() for x in (layer.usage, norm)])
        found[name] = {
            "iou": iou_of(both, size),
            "null": size / (2 * width - size),
            "null_interval": list(iou_interval(width, size)),
            "ceiling": 1.0,
            "correlation": float(torch.corrcoef(places)[0, 1]) if width > 1 else None,
        }
    return found


@dataclass(frozen=True)
class Dormant(Result):
    """Neurons whose score E|h_i| / mean_j E|h_j| is at most τ, by layer (Sokar et al. 2023).

    Attributes:
        scores: domain → layer → (neurons,) float64. A layer without any activation has scores of 0.
        intervals: domain → τ → 95 % interval of the share of dormant neurons in the whole model, sequences resampled;
            None where the domain has one group of them only.
    """

    taus: tuple[float, ...]
    scores: Mapping[str, Mapping[str, Tensor]]
    intervals: Mapping[str, Mapping[float, tuple[float, float] | None]]

    def indices(self, tau: float, domain: str | None = None) -> dict[str, Tensor]:
        """Layer → its dormant neurons (n,) int64, in one domain; None: those dormant in every domain."""
        chosen = list(self.scores.values()) if domain is None else [self.scores[domain]]
        return {
            layer: torch.stack([scores[layer] for scores in chosen]).amax(0).le(tau).nonzero().flatten()
            for layer in chosen[0]
        }

    def share(self, tau: float, domain: str | None = None) -> float:
        """Share of all neurons that are dormant."""
        width = sum(len(score) for score in next(iter(self.scores.values())).values())
        return sum(len(found) for found in self.indices(tau, domain).values()) / width

    def to_json(self) -> dict[str, Any]:
        """As plain JSON: for each τ the number of dormant neurons by layer, in each domain and in all of them."""
        layers = next(iter(self.scores.values()))

        def record(tau: float, domain: str | None) -> dict[str, Any]:
            interval = self.intervals[domain][tau] if domain is not None else None
            counts = [len(found) for found in self.indices(tau, domain).values()]
            return {"counts": counts, "share": self.share(tau, domain), "interval": interval and list(interval)}

        dormant = [
            {
                "tau": tau,
                "domains": {domain: record(tau, domain) for domain in self.scores},
                "all domains": record(tau, None),
            }
            for tau in self.taus
        ]
        neurons = [len(score) for score in layers.values()]
        return plain({"taus": self.taus, "domains": list(self.scores), "layers": list(layers), "neurons": neurons}) | {
            "dormant": dormant
        }


def dormant(
    scores: ActivationScores | Mapping[str, ActivationScores],
    taus: Sequence[float] = TAUS,
    *,
    part: str = "product",
    seed: int = 0,
) -> Dormant:
    """Dormant neurons of each domain, and of all.

    Neurons that are alike have scores near 1, so the null is none at any τ well below 1.

    Args:
        scores: of each domain by name, or of one set of data.
        taus: thresholds, at least 0.

    Raises:
        ValueError: no domain, or a threshold below 0.
    """
    by_domain = {"all data": scores} if isinstance(scores, ActivationScores) else dict(scores)
    check_domains(1, scores=by_domain)
    if any(tau < 0 for tau in taus):
        raise ValueError(f"taus: expected thresholds of at least 0, got {list(taus)}")
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for domain, one in by_domain.items():
        parts = one.part(part)
        found[domain] = {layer: _relative(p.magnitude.sum(0)) for layer, p in parts.items()}
        used = next(iter(parts.values())).tokens > 0
        weights = resamples(int(used.sum()), _RESAMPLES, generator) if int(used.sum()) > 1 else None
        width = sum(len(score) for score in found[domain].values())
        intervals[domain] = {}
        for tau in taus:
            interval = None
            if weights is not None:
                counts = sum((_relative(weights @ p.magnitude[used]) <= tau).sum(1) for p in parts.values())
                estimate = sum(int((score <= tau).sum()) for score in found[domain].values())
                interval = tuple(reflected_interval(_share(estimate, width), _share(counts, width)).tolist())
            intervals[domain][tau] = interval
    return Dormant(tuple(taus), found, intervals)


def _relative(sums: Tensor) -> Tensor:
    """Sokar's score of sums (..., neurons) of |h|, whatever the number of tokens."""
    mean = sums.mean(-1, keepdim=True)
    return torch.where(mean > 0, sums / mean, 0.0)


def _share(count: Tensor | int, width: int) -> Tensor:
    return torch.as_tensor(count, dtype=torch.float64) / width
