"""Which inputs the tokens of a text run through where layers are routed, and how many of them two tokens share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_cl.models.passes import Batch, Watch, stream
from sparse_cl.nn import RoutedLinear, routed_layers


@dataclass(frozen=True)
class Choices:
    """What the tokens of a text chose in one layer.

    Attributes:
        counts: (in_features,) float64: how many tokens chose each input.
        tokens: how many there were.
        k: inputs that each chose.
        open: inputs that each chose among.
    """

    counts: Tensor
    tokens: int
    k: int
    open: int

    @property
    def chance(self) -> float:
        """The overlap of choices that have nothing to do with each other: k of the open ones at random."""
        return self.k / self.open

    def overlap(self, other: Choices | None = None) -> float:
        """The share of its k inputs that a token of this text has in common with one of another, on average.

        Args:
            other: None: with another token of the same text; NaN of a text with one.
        """
        if other is None:
            if self.tokens < 2:
                return math.nan
            pairs = self.counts * (self.counts - 1)
            return float(pairs.sum()) / (self.tokens * (self.tokens - 1) * self.k)
        return float(self.counts @ other.counts) / (self.tokens * other.tokens * self.k)


def choices(model: nn.Module, batches: Iterable[Batch], *, tokens: str = "all") -> dict[str, Choices]:
    """What the tokens choose in each layer that is routed by its inputs, by name of the layer.

    Args:
        tokens: which count (`passes.TOKENS`).

    Raises:
        ValueError: no layer is routed; and those of `passes.stream`.
    """
    layers = {name: layer for name, layer in routed_layers(model).items() if layer.side == "inputs"}
    if not layers:
        raise ValueError("model: no layer is routed by its inputs; call sparse_cl.nn.route(model, ...) first")
    counts: dict[str, Tensor] = {}
    found = stream(model, [_watch(name, layer, counts) for name, layer in layers.items()], batches, tokens=tokens)
    return {
        name: Choices(counts[name].double().cpu(), found, min(layer.k, len(layer.open)), len(layer.open))
        for name, layer in layers.items()
    }


def overlaps(texts: Mapping[str, Choices]) -> dict[str, dict[str, float]]:
    """Of one layer the overlap of each two texts, by name; of each with itself on the diagonal."""
    return {
        first: {second: a.overlap(None if first == second else b) for second, b in texts.items()}
        for first, a in texts.items()
    }


def _watch(name: str, layer: RoutedLinear, counts: dict[str, Tensor]) -> Watch:
    counts[name] = torch.zeros(layer.in_features, dtype=torch.int64, device=layer.weight.device)

    def see(rows: Tensor, sequences: Tensor) -> None:
        chosen = layer.chosen(rows.to(layer.columns.dtype)).flatten()
        counts[name] += chosen.bincount(minlength=layer.in_features)

    return Watch(name, layer, "input", see)
