"""How far a model's hidden states moved between two checkpoints, on text that is the same for both."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl.models.parts import find_blocks
from sparse_cl.models.passes import Batch, Halves, Watch, call, stream

from .angles import principal_angles, subspace_overlap
from .cka import MIN_TOKENS, PairedMoments
from .features import Features, features
from .pairing import paired_weights
from .result import Result

WIDE_INTERVAL = 0.1
"""A CKA whose halves lie further apart is warned of."""


@dataclass(frozen=True)
class Measures(Result):
    """Drift of one layer, from x, its features before, to y, those after.

    Attributes:
        cka: debiased linear CKA of x and y: 1 for the same up to rotation and scale, about 0 for unrelated ones. None
            where it is not defined (`PairedMoments.cka`).
        overlap: ‖UᵀV‖²_F / k, the mean squared cosine of the principal angles between the spans of the k leading
            principal directions: 1 for the same span.
        displacement: root mean square, over the k principal directions of x, of how far the mean moved along them in
            units of x's standard deviation there.
        change: E‖y − x‖² / E‖x − E x‖²; None where x does not vary.
    """

    cka: float | None
    overlap: float
    displacement: float
    change: float | None


@dataclass(frozen=True)
class LayerDrift(Result):
    """Drift of one layer.

    Attributes:
        width, tokens: of the features.
        rank: k.
        all: over all tokens.
        halves: over the even and over the odd sequences alone: the spread of an estimate of half the tokens, not a
            confidence interval. None with too few tokens in either.
        null_overlap: k / width, of two random spans.
        ceiling_overlap: of the spans that the halves give before: what estimation alone leaves of 1.
        cosines: (k,) of the principal angles, largest first.
        displacements: (k,) signed, along each principal direction of x, in its standard deviations.
    """

    width: int
    tokens: int
    rank: int
    all: Measures
    halves: tuple[Measures, Measures] | None
    null_overlap: float
    ceiling_overlap: float | None
    cosines: Tensor
    displacements: Tensor

    def to_json(self) -> dict[str, Any]:
        record = super().to_json()
        return {**record.pop("all"), **record}


@dataclass(frozen=True)
class Drift(Result):
    """Result of `drift`: `layers` by name; `before` and `after`, the ranks of the features that were compared."""

    layers: dict[str, LayerDrift]
    before: Features
    after: Features

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            found |= {f"{name}.cosines": layer.cosines, f"{name}.displacements": layer.displacements}
        for when in ("before", "after"):
            found |= {f"{when}.{name}": tensor for name, tensor in getattr(self, when).tensors().items()}
        return found


class _Both(nn.Module):
    """Runs two models on a batch, the first one first; one model that is given twice only once."""

    def __init__(self, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, *parts: Tensor, **named: Tensor) -> None:
        call(self.before, named or parts, logits=False)
        if self.after is not self.before:
            call(self.after, named or parts, logits=False)


class _Seen:
    """Of one layer: its rows before, until those after come, and what was compared of even and odd sequences."""

    def __init__(self, halves: Halves) -> None:
        self.halves = halves
        self.rows: Tensor | None = None
        self.moments: tuple[PairedMoments, PairedMoments] | None = None
        self.squared_change: list[Tensor] = []

    def before(self, rows: Tensor, sequences: Tensor) -> None:
        self.rows = rows

    def after(self, rows: Tensor, sequences: Tensor) -> None:
        x, self.rows = self.rows, None
        assert x is not None  # the model before runs first
        # On the device of the rows before. To a device where it is, a tensor stays the same object, as `Halves` wants.
        y, sequences = rows.to(x.device, x.dtype), sequences.to(x.device)
        if self.moments is None:
            first = PairedMoments.about(x, y)
            self.moments = (first, first.empty())
            self.squared_change = [first.cross.new_zeros(()) for _ in range(2)]
        for half, index in enumerate(self.halves.of(sequences)):
            before, after = x[index], y[index]
            self.moments[half].add(before, after)
            self.squared_change[half] += (after.double() - before.double()).square().sum()


def drift(
    before: nn.Module,
    after: nn.Module,
    batches: Iterable[Batch],
    *,
    modules: Iterable[str] | None = None,
    rank: int | None = None,
    tokens: str = "text",
) -> Drift:
    """Runs both models on the same text and compares the outputs of their residual blocks, layer by layer.

    Streamed: nothing is kept but moments, 48 n² bytes for a layer of width n, and the features of one batch. A model
    compared with itself gives a CKA and an overlap of exactly 1, a displacement and a change of exactly 0.

    Args:
        before, after: checkpoints of one model.
        batches: a fixed reference text. A mapping of input_ids and attention_mask, or what else the models take.
        modules: names of modules whose outputs are compared in place of the blocks'.
        rank: k, leading principal directions that are compared; None: a sixteenth of the width, at least one.
        tokens: which count, see `TOKENS`.

    Raises:
        ValueError: checkpoints of different structure (the first parameter that differs is named), or that share
            modules; rank outside [1, width]; fewer than 4 tokens; and those of `stream`.
    """
    for _ in paired_weights(before, after):
        pass
    names = [block.name for block in find_blocks(before)] if modules is None else list(modules)
    places = [(name, _module(before, name), _module(after, name)) for name in names]
    shared = [name for name, x, y in places if x is y]
    if shared and after is not before:
        raise ValueError(
            f"before and after share {shared[0]}, so both are one model (a PEFT model is made inside its base): load "
            "the checkpoint before once more"
        )
    halves = Halves()
    seen = {name: _Seen(halves) for name in names}
    watches = []
    for name, x, y in places:
        watches.append(Watch(f"{name} before", x, "output", seen[name].before))
        watches.append(Watch(f"{name} after", y, "output", seen[name].after))
    stream(_Both(before, after), watches, batches, tokens=tokens)
    moments = {name: layer.moments for name, layer in seen.items() if layer.moments is not None}
    layers = {name: _layer(name, *pair, seen[name].squared_change, rank) for name, pair in moments.items()}
    _warn_of_width(layers)
    return Drift(
        layers,
        features({name: (even.x, odd.x) for name, (even, odd) in moments.items()}, center=True),
        features({name: (even.y, odd.y) for name, (even, odd) in moments.items()}, center=True),
    )


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"modules: {type(model).__name__} has no module {name!r}; give names of modules") from error


def _layer(
    name: str, even: PairedMoments, odd: PairedMoments, squared_change: list[Tensor], rank: int | None
) -> LayerDrift:
    both = even.joined(odd)
    count, width = both.x.count, len(both.x.sum)
    if count < MIN_TOKENS:
        raise ValueError(f"batches: expected at least {MIN_TOKENS} tokens, got {count}; give more text")
    k = max(1, width // 16) if rank is None else rank
    if not 1 <= k <= width:
        raise ValueError(f"rank: expected 1 to {width}, the width of {name}, got {rank}")
    values, directions = _principal(both.x.covariance(), k)
    first, second = squared_change
    measured, cosines, displacements = _measure(both, first + second, values, directions)
    halves = ceiling = None
    if min(even.x.count, odd.x.count) >= MIN_TOKENS:
        halves = (_measure(even, first, values, directions)[0], _measure(odd, second, values, directions)[0])
        ceiling = subspace_overlap(*(_principal(half.x.covariance(), k)[1] for half in (even, odd)))
    return LayerDrift(width, count, k, measured, halves, k / width, ceiling, cosines.cpu(), displacements.cpu())


def _measure(
    pair: PairedMoments, squared_change: Tensor, values: Tensor, directions: Tensor
) -> tuple[Measures, Tensor, Tensor]:
    """Measures, cosines and displacements; those along `directions`, where x has the variances `values`."""
    k = len(values)
    deviations = values.clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    if squared_change == 0:
        # Bit for bit the same features: not 1 - 1e-16.
        ones = torch.ones_like(values)
        return Measures(None if pair.cka() is None else 1.0, 1.0, 0.0, 0.0), ones, torch.zeros_like(values)
    cosines = principal_angles(_principal(pair.x.covariance(), k)[1], _principal(pair.y.covariance(), k)[1]).cos()
    displacements = directions.mT @ (pair.y.mean() - pair.x.mean()) / deviations
    displacements = torch.where(values > 0, displacements, 0.0)
    variance = pair.x.covariance().trace()
    measures = Measures(
        pair.cka(),
        cosines.square().mean().item(),
        displacements.square().mean().sqrt().item(),
        (squared_change / pair.x.count / variance).item() if variance > 0 else None,
    )
    return measures, cosines, displacements


def _principal(covariance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues (k,), and their eigenvectors (n, k)."""
    values, vectors = torch.linalg.eigh(covariance)
    floor = values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
    return torch.where(values > floor, values, 0.0)[-k:].flip(0), vectors[:, -k:].flip(1)


def _warn_of_width(layers: Mapping[str, LayerDrift]) -> None:
    tokens = next(iter(layers.values())).tokens
    halves = {name: layer.halves for name, layer in layers.items() if layer.halves is not None}
    if len(halves) < len(layers):
        warnings.warn(
            f"drift: {tokens} tokens of too few sequences for an interval; give at least two sequences of text",
            stacklevel=3,
        )
        return
    similarities = {name: (even.cka, odd.cka) for name, (even, odd) in halves.items()}
    widths = {n: abs(even - odd) for n, (even, odd) in similarities.items() if even is not None and odd is not None}
    name = max(widths, key=widths.__getitem__, default=None)
    if name is not None and widths[name] > WIDE_INTERVAL:
        warnings.warn(
            f"drift: on {tokens} tokens the CKA of the two halves of the text differs by {widths[name]:.2f} in {name}; "
            "give more text",
            stacklevel=3,
        )
