"""Capacity: how much of each layer's input space domains use, and how much of a new domain's gradient is left."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_cl.subspace.consolidation import leading
from sparse_cl.subspace.moments import ExactMoment
from sparse_cl.subspace.settings import Settings
from sparse_cl.subspace.subspace import Subspace, energy_of

from .checks import check_alike, check_domains, check_shares
from .inputs import InputMoments
from .result import Result

SCARCE = 0.1
"""A layer in which a smaller share than this of a new domain's gradient survives can learn little of that domain."""


Layers = Mapping[str, Mapping[str, Any]]
"""What a method that protects subspaces reports of a domain: layer → `width` (input directions), `used` and `free` of
them once the domain is learned (ints); `surviving`, B: the share of the energy of the domain's gradient, before it is
learned, that lies outside the basis in force; `leak`, the share of the energy of the layer's change over the domain
that lies inside that basis (None where there was none)."""


def scarcity(layers: Layers) -> str | None:
    """A sentence on the layers in which less than `SCARCE` of the gradient survives; None where there are none."""
    scarce = [name for name, layer in layers.items() if layer["surviving"] < SCARCE]
    if not scarce:
        return None
    worst = min(scarce, key=lambda name: layers[name]["surviving"])
    return (
        f"less than {SCARCE:.0%} of the new domain's gradient survives in {len(scarce)} of "
        f"{len(layers)} layers; the least, {layers[worst]['surviving']:.2%}, in {worst}"
    )


@dataclass(frozen=True)
class LayerCapacity(Result):
    """One input space of n directions, shared by `layers`, through the domains in order.

    Attributes:
        alone: directions that each domain would need by itself.
        alone_halves: the same from each half of its sequences: how sure `alone` is.
        used: directions in use after each domain.
        used_null: the same had each domain's directions been turned at random: its spectrum in a random eigenbasis.
        repeated: directions that the second half of each domain adds to those of its first: near 0 when the directions
            are known well; read what a domain adds to others against it.
        surviving: B, the share of the energy of each domain's mean gradient outside what earlier domains use, the
            mean over `layers` by energy; None where no gradients were given.
    """

    width: int
    layers: tuple[str, ...]
    alone: list[int]
    alone_halves: list[tuple[int, int]]
    used: list[int]
    used_null: list[int]
    repeated: list[int]
    surviving: list[float] | None

    @property
    def free(self) -> int:
        return self.width - self.used[-1]

    def left(self) -> float | None:
        """C·B after the last domain: the free share times the share of its gradient that survived."""
        return None if self.surviving is None else self.free / self.width * self.surviving[-1]

    def to_json(self) -> dict[str, Any]:
        after = {"free": self.free, "left": self.left(), "forecast": forecast(self.used, self.width)}
        return super().to_json() | after


@dataclass(frozen=True)
class Capacity(Result):
    """What domains use of each layer; see `capacity`."""

    domains: tuple[str, ...]
    energy: float
    tokens: dict[str, int]
    layers: dict[str, LayerCapacity]
    neurons: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        of_layers = [forecast(layer.used, layer.width) for layer in self.layers.values()]
        return {**super().to_json(), "forecast": forecast_of_model(of_layers)}


def capacity(
    moments: Mapping[str, InputMoments],
    *,
    energy: float = 0.95,
    gradients: Mapping[str, Mapping[str, Tensor]] | None = None,
    activations: Mapping[str, Mapping[str, Tensor]] | None = None,
    mass: float = 0.9,
    seed: int = 0,
) -> Capacity:
    """What each domain uses of each layer, in the order given, and what is left.

    A domain's directions are found as `SubspaceMemory` does: the fewest that, with those in use, explain `energy` of
    its inputs (GPM's criterion, Saha, Garg & Roy 2021).

    Args:
        moments: domain → its inputs, from `InputProbe`.
        energy: share in (0, 1].
        gradients: domain → {layer: mean gradient (outputs, inputs)}, for B.
        activations: domain → {layer: mean |activation| (neurons,)}, for the neurons in use: the fewest with `mass` of
            the sum.
        seed: of the random rotations of the null.

    Raises:
        ValueError: no domain; domains that were probed on other models; a share outside (0, 1].
    """
    check_shares(energy=energy, mass=mass)
    check_domains(1, moments=moments)
    widths = {d: {name: pair[0].columns for name, pair in seen.halves.items()} for d, seen in moments.items()}
    check_alike("moments", "inputs", widths)
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, reading in next(iter(moments.values())).layers.items():
        of_layer = None
        if gradients is not None:
            of_layer = [[gradients[domain][layer] for layer in reading] for domain in moments]
        layers[name] = _layer(reading, [seen.halves[name] for seen in moments.values()], energy, of_layer, generator)
    tokens = {domain: seen.tokens for domain, seen in moments.items()}
    return Capacity(tuple(moments), energy, tokens, layers, _neurons(activations, mass) if activations else {})


def forecast(used: Sequence[int], width: int) -> dict[str, float | None]:
    """How many more domains fit into what is free, if each takes what a domain took so far.

    `expected` is by the last domain's demand, `low` and `high` by the largest and the smallest since the first, which
    pays for what all share. A demand of nothing gives None: no end is in sight.

    Args:
        used: directions in use after each domain.
        width: directions in all.
    """
    added = [after - before for before, after in zip(used, used[1:], strict=False)] or [used[0]]
    free = width - used[-1]
    return {
        name: free / demand if demand else None
        for name, demand in (("low", max(added)), ("expected", added[-1]), ("high", min(added)))
    }


def forecast_of_model(layers: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The median over layers of each of `forecast`'s numbers, and `first`: the layer that is full first."""
    known = {
        key: [math.inf if (value := layer[key]) is None else value for layer in layers]
        for key in ("low", "expected", "high")
    }
    numbers = {key: statistics.median(values) for key, values in known.items()} | {"first": min(known["expected"])}
    return {key: None if math.isinf(value) else value for key, value in numbers.items()}


def _layer(
    reading: tuple[str, ...],
    halves: Sequence[tuple[ExactMoment, ExactMoment]],
    energy: float,
    gradients: Sequence[Sequence[Tensor]] | None,
    generator: torch.Generator,
) -> LayerCapacity:
    found = LayerCapacity(halves[0][0].columns, reading, [], [], [], [], [], None if gradients is None else [])
    subspace = null = None
    for number, (one, other) in enumerate(halves):
        whole, first = _sum((one, other)), _grown(None, one, energy)
        if found.surviving is not None and gradients is not None:
            found.surviving.append(_surviving(gradients[number], subspace))
        subspace = _grown(subspace, whole, energy)
        # The first domain has none before it that its directions could be random to.
        null = subspace if null is None else _grown(null, _turned(whole, generator), energy)
        found.alone.append(_grown(None, whole, energy).rank if number else subspace.rank)
        found.alone_halves.append((first.rank, _grown(None, other, energy).rank))
        found.repeated.append(_grown(first, other, energy).rank - first.rank)
        found.used.append(subspace.rank)
        found.used_null.append(null.rank)
    return found


def _sum(halves: tuple[ExactMoment, ExactMoment]) -> ExactMoment:
    device, dtype = halves[0].place
    whole = ExactMoment(halves[0].columns, dtype, device)
    for half in halves:
        whole.merge(half.tensors())
    return whole


def _grown(subspace: Subspace | None, moment: ExactMoment, energy: float) -> Subspace:
    """With what a further domain uses."""
    return leading([moment], [subspace], 1.0, [1.0], Settings(energy=energy))[0]


def _turned(moment: ExactMoment, generator: torch.Generator) -> ExactMoment:
    """The same spectrum in a random eigenbasis (Haar: the Q of a Gaussian matrix, with the signs of R's diagonal)."""
    (device, dtype), width = moment.place, moment.columns
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    q = (q * r.diagonal().sign()).to(device, dtype)
    turned = ExactMoment(width, dtype, device)
    turned.merge({"upper": q @ moment.moment @ q.mT, "count": moment.count})
    return turned


def _surviving(gradients: Sequence[Tensor], subspace: Subspace | None) -> float:
    total = inside = 0.0
    for gradient in gradients:
        total += float(energy_of(gradient))
        if subspace is not None:
            inside += float(subspace.energies(gradient.to(subspace.device)).sum())
    return 1.0 if not total else 1.0 - inside / total


def neurons_holding(mean: Tensor, mass: float = 0.9) -> Tensor:
    """The fewest neurons that hold a share of the sum: (neurons,) bool, on the CPU.

    Args:
        mean: (neurons,) mean |activation| of a domain.
        mass: that share, in (0, 1].
    """
    mean = mean.double()
    order = mean.argsort(descending=True)
    share = mean[order].cumsum(0) / mean.sum().clamp(min=torch.finfo(torch.float64).tiny)
    count = min(mean.numel(), int((share < mass - 1e-12).sum()) + 1)
    holding = torch.zeros(mean.numel(), dtype=torch.bool)
    holding[order[:count].cpu()] = True
    return holding


def _neurons(activations: Mapping[str, Mapping[str, Tensor]], mass: float) -> dict[str, dict[str, Any]]:
    """Layer → neurons in all, those that each domain uses alone, and those in use after each domain."""
    result = {}
    for layer in next(iter(activations.values())):
        alone = torch.stack([neurons_holding(means[layer], mass) for means in activations.values()])
        used = alone.cumsum(0).bool().sum(1).tolist()
        width = alone.shape[1]
        result[layer] = {"neurons": width, "alone": alone.sum(1).tolist(), "used": used, "free": width - used[-1]}
    return result
