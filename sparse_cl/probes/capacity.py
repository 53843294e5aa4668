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

from .inputs import InputMoments

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
class LayerCapacity:
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


@dataclass(frozen=True)
class Capacity:
    """What domains use of each layer; see `capacity`."""

    domains: tuple[str, ...]
    energy: float
    tokens: dict[str, int]
    layers: dict[str, LayerCapacity]
    neurons: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "domains": list(self.domains),
            "energy": self.energy,
            "tokens": self.tokens,
            "layers": {
                name: {**vars(layer), "layers": list(layer.layers), "free": layer.free, "left": layer.left()}
                | {"alone_halves": [list(pair) for pair in layer.alone_halves]}
                | {"forecast": forecast(layer.used, layer.width)}
                for name, layer in self.layers.items()
            },
            "neurons": self.neurons,
            "forecast": forecast_of_model([forecast(layer.used, layer.width) for layer in self.layers.values()]),
        }


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

    A domain's directions are found as `SubspaceMemory` does: the fewest that leave out no more than 1 - `energy` of
    its inputs beside what was left out before (GPM's criterion, Saha, Garg & Roy 2021).

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
    for name, share in (("energy", energy), ("mass", mass)):
        if not 0 < share <= 1:
            raise ValueError(f"{name}: expected a share in (0, 1], got {share}")
    if not moments:
        raise ValueError("moments: expected at least one domain, got none")
    first = next(iter(moments.values()))
    for domain, seen in moments.items():
        widths = [{name: pair[0].columns for name, pair in m.halves.items()} for m in (first, seen)]
        if widths[0] != widths[1]:
            raise ValueError(
                f"moments: {domain!r} was probed on another model than {next(iter(moments))!r}: "
                f"inputs {_differing(*widths)}. Run one InputProbe's model over all domains"
            )
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in first.halves:
        reading = first.layers[name]
        of_layer = None
        if gradients is not None:
            of_layer = [[gradients[domain][layer] for layer in reading] for domain in moments]
        layers[name] = _layer(reading, [seen.halves[name] for seen in moments.values()], energy, of_layer, generator)
    return Capacity(
        tuple(moments),
        energy,
        {domain: seen.tokens for domain, seen in moments.items()},
        layers,
        {} if activations is None else _neurons(activations, mass),
    )


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
    width = halves[0][0].columns
    alone, alone_halves, repeated = [], [], []
    used, used_null, surviving = [], [], []
    subspace = null = None
    for number, pair in enumerate(halves):
        whole, first = _sum(pair), _grown(None, pair[0], energy)
        alone_halves.append((first.rank, _grown(None, pair[1], energy).rank))
        repeated.append(_further(pair[1], first, energy))
        if gradients is not None:
            surviving.append(_surviving(gradients[number], subspace))
        if subspace is None:
            subspace = null = _grown(None, whole, energy)
            alone.append(subspace.rank)
        else:
            subspace, null = _grown(subspace, whole, energy), _grown(null, _turned(whole, generator), energy)
            alone.append(_grown(None, whole, energy).rank)
        used.append(subspace.rank)
        used_null.append(null.rank)
    return LayerCapacity(
        width, reading, alone, alone_halves, used, used_null, repeated, surviving if gradients is not None else None
    )


def _sum(halves: tuple[ExactMoment, ExactMoment]) -> ExactMoment:
    device, dtype = halves[0].place
    whole = ExactMoment(halves[0].columns, dtype, device)
    for half in halves:
        whole.merge(half.tensors())
    return whole


def _grown(subspace: Subspace | None, moment: ExactMoment, energy: float) -> Subspace:
    """With what a further domain uses."""
    return leading([moment], [subspace], 1.0, [1.0], Settings(energy=energy))[0]


def _further(moment: ExactMoment, subspace: Subspace, energy: float) -> int:
    """The fewest directions that, with those of the subspace, explain `energy` of the moment."""
    whole = moment.moment.double()
    basis = subspace.basis.double()
    left = whole - basis @ (basis.mT @ whole)
    left = left - (left @ basis) @ basis.mT
    values = torch.linalg.eigvalsh((left + left.mT) / 2).flip(0).clamp(min=0)
    missing = left.diagonal().sum() - (1 - energy) * whole.diagonal().sum()
    # Rounding leaves a direction of nothing where nothing is missing.
    floor = torch.finfo(torch.float32).eps * whole.diagonal().sum()
    return int((values.cumsum(0) - values < missing - floor).sum())


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
        alone = [neurons_holding(means[layer], mass) for means in activations.values()]
        used, union = torch.zeros_like(alone[0]), []
        for mine in alone:
            used = used | mine
            union.append(int(used.sum()))
        result[layer] = {
            "neurons": used.numel(),
            "alone": [int(mine.sum()) for mine in alone],
            "used": union,
            "free": used.numel() - union[-1],
        }
    return result


def _differing(first: Mapping[str, int], second: Mapping[str, int]) -> str:
    name = next(n for n in {**first, **second} if first.get(n) != second.get(n))
    return f"{name} has width {second.get(name, 'none')}, expected {first.get(name, 'none')}"
