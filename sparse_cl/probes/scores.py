"""What an activation probe found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from sparse_cl import storage
from sparse_cl.masks import ColumnMask, RowMask
from sparse_cl.models.neuron_masks import Place, neuron_masks, top_neurons

from .resampling import reflected_interval, resamples
from .sparsity import LEVELS, SHARES, chance_curve, chance_needed, curve_at

_RESAMPLES = 200


@dataclass(frozen=True)
class PartScores:
    """Sums over the tokens of one part of a layer: float64, on the CPU.

    Attributes:
        magnitude: (groups, neurons), Σ |a|.
        massive: (groups, neurons), that of massive activations alone.
        massive_entries: (), how many those are.
        tokens: (groups,), how many.
        top: (neurons,), ranked tokens in whose top share a neuron is.
        profile: (neurons,), Σ over ranked tokens of the share of their L1 mass in their largest neuron, their second,
            and so on.
        needed: (levels, groups), Σ over ranked tokens of the share of neurons that holds each of `sparsity.LEVELS`.
        ranked: (groups,), how many tokens were ranked.
    """

    magnitude: Tensor
    massive: Tensor
    massive_entries: Tensor
    tokens: Tensor
    top: Tensor
    profile: Tensor
    needed: Tensor
    ranked: Tensor

    def sums(self, massive: bool) -> Tensor:
        """(groups, neurons): Σ |a|, without massive activations unless they are asked for."""
        return self.magnitude if massive else self.magnitude - self.massive


@dataclass(frozen=True)
class ActivationScores:
    """How active each neuron is, and how few hold most of a token's L1 mass.

    Attributes:
        parts: layer → part ("product", "gate", "up") → its sums.
        where: layer → the places of its neurons' weights, or a sentence that says why they are not known.
        top_share: that of the frequencies.
    """

    parts: Mapping[str, Mapping[str, PartScores]]
    where: Mapping[str, tuple[Place, ...] | str]
    top_share: float

    @property
    def tokens(self) -> int:
        """How many tokens counted."""
        return int(max(parts["product"].tokens.sum() for parts in self.parts.values()))

    def part(self, part: str = "product") -> dict[str, PartScores]:
        """The sums of one part of every layer that has it.

        Raises:
            ValueError: no layer has.
        """
        found = {layer: parts[part] for layer, parts in self.parts.items() if part in parts}
        if not found:
            known = sorted({name for parts in self.parts.values() for name in parts})
            raise ValueError(f"part: expected one of {', '.join(known)}, got {part!r}")
        return found

    def mean(self, part: str = "product", massive: bool = True) -> dict[str, Tensor]:
        """Mean |activation| of each neuron: layer → (neurons,) float64.

        Args:
            massive: False: massive activations count as zeros.
        """
        return {layer: p.sums(massive).sum(0) / p.tokens.sum() for layer, p in self.part(part).items()}

    def frequency(self, part: str = "product") -> dict[str, Tensor]:
        """Share of the ranked tokens in whose `top_share` a neuron is: layer → (neurons,) float64."""
        return {layer: p.top / p.ranked.sum() for layer, p in self.part(part).items()}

    def curve(self, part: str = "product", shares: tuple[float, ...] = SHARES) -> dict[str, Tensor]:
        """Share of a token's L1 mass in the top share of its neurons, mean over tokens: layer → (shares,) float64."""
        return {layer: curve_at(p.profile / p.ranked.sum(), shares) for layer, p in self.part(part).items()}

    def needed(self, level: float = 0.99, part: str = "product") -> dict[str, float]:
        """Share of the neurons that hold `level` (0.9 or 0.99) of a token's L1 mass, mean over tokens, by layer."""
        if level not in LEVELS:
            raise ValueError(f"level: expected one of {', '.join(map(str, LEVELS))}, got {level}")
        row = LEVELS.index(level)
        return {layer: float(p.needed[row].sum() / p.ranked.sum()) for layer, p in self.part(part).items()}

    def top(self, fraction: float) -> dict[str, RowMask | ColumnMask]:
        """Masks that free the neurons with the largest mean |activation|, ready for `SparseMaskedAdamW`.

        Args:
            fraction: of each layer's neurons, in (0, 1]; rounded, at least one neuron.

        Returns:
            Parameter name → mask, for rows of the layers into the neurons with their biases, and columns of the layer
            out of them.

        Raises:
            ValueError: a fraction out of range; a layer whose neurons' weights are not known.
        """
        masks: dict[str, RowMask | ColumnMask] = {}
        for layer, mean in self.mean().items():
            where = self.where[layer]
            if isinstance(where, str):
                raise ValueError(f"top: no mask can be made. {where}")
            masks |= neuron_masks(where, top_neurons(mean, fraction))
        return masks

    def to_json(self) -> dict[str, Any]:
        """Curves, needed shares with their bootstrap intervals over groups, and what chance gives, as plain JSON.

        `layers` has for each layer its name, its number of neurons, and under `parts` the `curve` at `shares`, `needed`
        by level and `massive`, the number of massive activations; `mean` has the means over layers by part; `chance`
        by part what independent Gaussians (for the product of a GLU: products of two) give.
        """
        gated = any(len(parts) > 1 for parts in self.parts.values())
        names = sorted({part for parts in self.parts.values() for part in parts})
        mean, chance = {}, {}
        by_layer: dict[str, dict[str, Any]] = {layer: {} for layer in self.parts}
        for name in names:
            product = gated and name == "product"
            curves = self.curve(name)
            found, over_layers = _needed_with_intervals(self.part(name))
            for layer, part in self.part(name).items():
                curve = curves[layer].tolist()
                by_layer[layer][name] = {"curve": curve, "massive": int(part.massive_entries), "needed": found[layer]}
            mean[name] = {"curve": torch.stack(list(curves.values())).mean(0).tolist(), "needed": over_layers}
            chance[name] = {
                "curve": chance_curve(product),
                "needed": {str(level): chance_needed(level, product) for level in LEVELS},
            }
        widths = {layer: len(parts["product"].top) for layer, parts in self.parts.items()}
        return {
            "tokens": self.tokens,
            "ranked_tokens": int(max(p.ranked.sum() for p in self.part().values())),
            "groups": int((next(iter(self.part().values())).tokens > 0).sum()),
            "shares": list(SHARES),
            "layers": [{"name": k, "neurons": widths[k], "parts": parts} for k, parts in by_layer.items()],
            "mean": mean,
            "chance": chance,
        }

    def tensors(self) -> dict[str, Tensor]:
        """All sums, by `layer|part|name`."""
        return {
            f"{layer}|{part}|{field.name}": getattr(scores, field.name)
            for layer, parts in self.parts.items()
            for part, scores in parts.items()
            for field in fields(PartScores)
        }

    def save(self, path: str | PathLike) -> None:
        """Writes a safetensors file that `load` reads."""
        where = {k: v if isinstance(v, str) else [asdict(place) for place in v] for k, v in self.where.items()}
        parts = [[layer, list(found)] for layer, found in self.parts.items()]
        storage.write(path, "activation", self.tensors(), parts=parts, where=where, top_share=self.top_share)

    @classmethod
    def load(cls, path: str | PathLike) -> ActivationScores:
        """Reads what `save` wrote; raises the errors of `sparse_cl.storage.read`."""
        writer = "ActivationScores.save"
        tensors, facts = storage.read(path, "activation", writer, "parts", "where", "top_share")
        try:
            parts = {
                layer: {
                    part: PartScores(
                        **{field.name: tensors[f"{layer}|{part}|{field.name}"] for field in fields(PartScores)}
                    )
                    for part in names
                }
                for layer, names in facts["parts"]
            }
            where = {
                layer: v if isinstance(v, str) else tuple(Place(**{**p, "shape": tuple(p["shape"])}) for p in v)
                for layer, v in facts["where"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}: not a readable activation file ({error!r}); write it again with {writer}"
            ) from error
        return cls(parts=parts, where=where, top_share=facts["top_share"])


def _needed_with_intervals(parts: Mapping[str, PartScores]) -> tuple[dict[str, Any], dict[str, Any]]:
    """For each layer, and for the mean over layers: level → {"mean", "interval"} (None with a single group)."""
    generator = torch.Generator().manual_seed(0)
    weights: Tensor | None = None
    estimates, resampled = [], []
    for part in parts.values():
        used = part.ranked > 0
        if weights is None and int(used.sum()) > 1:
            weights = resamples(int(used.sum()), _RESAMPLES, generator)
        sums, counts = part.needed[:, used], part.ranked[used]
        estimates.append(sums.sum(1) / counts.sum())
        if weights is not None:
            resampled.append((weights @ sums.mT) / (weights @ counts)[:, None])

    def record(estimate: Tensor, drawn: Tensor | None) -> dict[str, Any]:
        intervals = None if drawn is None else reflected_interval(estimate, drawn).tolist()
        return {
            str(level): {"mean": float(estimate[i]), "interval": intervals and intervals[i]}
            for i, level in enumerate(LEVELS)
        }

    drawn: Sequence[Tensor | None] = resampled or [None] * len(estimates)
    by_layer = {layer: record(e, d) for layer, e, d in zip(parts, estimates, drawn, strict=True)}
    together = torch.stack(resampled).mean(0) if resampled else None
    return by_layer, record(torch.stack(estimates).mean(0), together)
