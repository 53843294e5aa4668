"""Hidden states of a model, streamed: their mean, their covariance, and how many directions they fill."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl.models.parts import find_blocks
from sparse_cl.models.passes import Batch, Halves, Watch, stream
from sparse_cl.reference.precision import full_precision
from sparse_cl.subspace.moments import row_blocks

from .rank import gaussian_ranks, ranks_of
from .result import Result, apart


class Moment:
    """Count, mean and second moment of rows, about a fixed point near their mean, which keeps rounding small.

    Products are float32 (float64 for float64 rows), their sums float64: 8 n² bytes for a width of n.
    """

    def __init__(self, shift: Tensor):
        """shift: (n,), in the dtype of the products."""
        wide = shift.new_zeros(shift.shape, dtype=torch.float64)
        self.shift, self.count = shift, 0
        self.sum, self.product = wide, torch.outer(wide, wide)

    @classmethod
    def about(cls, rows: Tensor) -> Moment:
        """An empty one about the mean of `rows`, which are not counted."""
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        return cls(rows.mean(0, dtype=dtype) if len(rows) else rows.new_zeros(rows.shape[1], dtype=dtype))

    def empty(self) -> Moment:
        """One about the same point, that this can be joined with."""
        return Moment(self.shift)

    def add(self, rows: Tensor) -> None:
        """Counts rows (t, n)."""
        with full_precision(rows.device):
            for block in row_blocks(rows, self.shift.dtype):
                block = block - self.shift
                self.product += block.mT @ block
                self.sum += block.sum(0, dtype=torch.float64)
        self.count += len(rows)

    def joined(self, other: Moment) -> Moment:
        """The moment of the rows of both; they must have one shift."""
        both = self.empty()
        both.count = self.count + other.count
        both.sum, both.product = self.sum + other.sum, self.product + other.product
        return both

    def mean(self) -> Tensor:
        """(n,), float64."""
        return self.sum / self.count + self.shift.double()

    def covariance(self) -> Tensor:
        """(n, n), float64, divided by the count."""
        mean = self.sum / self.count
        return self.product / self.count - torch.outer(mean, mean)

    def second_moment(self) -> Tensor:
        """E[x xᵀ] about 0: (n, n), float64."""
        mean = self.mean()
        return self.covariance() + torch.outer(mean, mean)


@dataclass(frozen=True)
class LayerFeatures(Result):
    """Ranks of one layer's features.

    Attributes:
        width, tokens: of the features.
        effective_rank, stable_rank: of the matrix of all tokens' features.
        effective_rank_halves, stable_rank_halves: the same of the even and of the odd sequences alone, an interval;
            None with fewer than two tokens in either.
        gaussian_effective_rank, gaussian_stable_rank: of random features of this width and number of tokens, the null.
            The ceiling is the smaller of width and tokens.
    """

    width: int
    tokens: int
    effective_rank: float
    stable_rank: float
    effective_rank_halves: tuple[float, float] | None
    stable_rank_halves: tuple[float, float] | None
    gaussian_effective_rank: float
    gaussian_stable_rank: float


@dataclass(frozen=True)
class Features(Result):
    """Result of `FeatureProbe`.

    Attributes:
        layers: by name.
        centered: whether the mean was taken off.
        spectra: of each layer (width,) float64, largest first: singular values of the features over √tokens, which are
            the standard deviations along the principal directions where the mean was taken off.
        means: of each layer (width,) float64.
    """

    layers: dict[str, LayerFeatures]
    centered: bool
    spectra: dict[str, Tensor] = apart()
    means: dict[str, Tensor] = apart()

    def to_json(self) -> dict[str, Any]:
        record = super().to_json()
        for name, layer in record["layers"].items():
            layer["spectrum"] = self.spectra[name].tolist()
        return record

    def tensors(self) -> dict[str, Tensor]:
        spectra = {f"{name}.spectrum": values for name, values in self.spectra.items()}
        return spectra | {f"{name}.mean": mean for name, mean in self.means.items()}


class FeatureProbe:
    """Effective and stable rank of hidden states, from their streamed mean and covariance: 16 n² bytes per layer.

    Args:
        model: whose blocks' outputs are the features.
        modules: {name: module} whose outputs are the features in place of the blocks'.
        tokens: which count, see `TOKENS`.
        center: take the mean off. With it the rank counts directions in which tokens differ; without, the common mean
            is most often the first.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module] | None = None,
        *,
        tokens: str = "text",
        center: bool = True,
    ) -> None:
        self.model, self.tokens, self.center = model, tokens, center
        self.modules = dict(modules) if modules is not None else {b.name: b.module for b in find_blocks(model)}
        self._moments: dict[str, tuple[Moment, Moment]] = {}

    def watches(self) -> list[Watch]:
        """What to look at in a pass; what was seen before is dropped."""
        self._moments, halves = {}, Halves()

        def see(name: str) -> Callable[[Tensor, Tensor], None]:
            def add(rows: Tensor, sequences: Tensor) -> None:
                if name not in self._moments:
                    first = Moment.about(rows)
                    self._moments[name] = (first, first.empty())
                for moment, index in zip(self._moments[name], halves.of(sequences), strict=True):
                    moment.add(rows[index])

            return add

        return [Watch(name, module, "output", see(name)) for name, module in self.modules.items()]

    def run(self, batches: Iterable[Batch]) -> Features:
        """Raises the errors of `stream` and of `result`."""
        stream(self.model, self.watches(), batches, tokens=self.tokens)
        return self.result()

    def result(self) -> Features:
        """
        Raises:
            ValueError: fewer than two tokens were seen.

        Warns:
            UserWarning: no more tokens than the width, which they bound the ranks by.
        """
        found = features(self._moments, center=self.center)
        name, layer = max(found.layers.items(), key=lambda item: item[1].width / item[1].tokens)
        if layer.tokens <= layer.width:
            halves = layer.effective_rank_halves
            interval = f" (its halves give {halves[0]:.1f} and {halves[1]:.1f})" if halves else ""
            warnings.warn(
                f"rank: {layer.tokens} tokens for the {layer.width} dimensions of {name}, so that its effective rank, "
                f"{layer.effective_rank:.1f}{interval}, is bounded by the tokens; give more text",
                stacklevel=2,
            )
        return found


def features(moments: Mapping[str, tuple[Moment, Moment]], *, center: bool) -> Features:
    """From the moments of the even and the odd sequences of each layer."""
    layers, spectra, means = {}, {}, {}
    for name, (even, odd) in moments.items():
        both = even.joined(odd)
        if both.count < 2:
            raise ValueError(f"batches: expected at least 2 tokens for the ranks of {name}, got {both.count}")
        sigma = standard_deviations(both, center)
        effective = stable = None
        if min(even.count, odd.count) >= 2:
            effective, stable = zip(*(ranks_of(standard_deviations(half, center)) for half in (even, odd)), strict=True)
        null = gaussian_ranks(both.count - center, len(sigma))
        layers[name] = LayerFeatures(len(sigma), both.count, *ranks_of(sigma), effective, stable, *null)
        spectra[name], means[name] = sigma.cpu(), both.mean().cpu()
    if not layers:
        raise ValueError("nothing was seen yet: call run(batches), or stream(model, probe.watches(), batches) first")
    return Features(layers, center, spectra, means)


def standard_deviations(moment: Moment, center: bool) -> Tensor:
    """Singular values of the rows over √count, largest first: (n,) float64."""
    values = torch.linalg.eigvalsh(moment.covariance() if center else moment.second_moment())
    return values.flip(0).clamp(min=0).sqrt()
