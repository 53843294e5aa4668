"""How widely an update spreads over a model's neurons, and how much of it falls on its hubs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_cl.models.parts import Block, find_blocks, is_transposed, linear_layers, matrix_of

from .pairing import Weights, paired_matrices
from .result import Result, apart

SHARE = 0.9
"""Of an update's energy ‖ΔW‖²_F, whose spread is asked for."""


def smallest_share(energy: Tensor, share: float = SHARE) -> float | None:
    """Smallest share of the entries that holds `share` of their sum; the last of them is counted in part.

    So equal entries give `share` itself, the null of an update that is spread evenly, whatever their number.

    Args:
        energy: (n,), not negative.
        share: in (0, 1].

    Returns:
        In (0, 1]; None where the sum is 0.
    """
    ordered = energy.double().sort(descending=True).values
    held = ordered.cumsum(0)
    if not len(ordered) or held[-1] == 0:
        return None
    wanted = share * held[-1]
    whole = min(int((held < wanted).sum()), len(held) - 1)
    rest = wanted - (held[whole - 1] if whole else 0.0)
    return (whole + (rest / ordered[whole]).clamp(0, 1).item()) / len(ordered)


@dataclass(frozen=True)
class Spread(Result):
    """Spread of one update over neurons.

    Attributes:
        neurons: how many there are.
        energy: ‖ΔW‖²_F, squared units of the weights.
        relative: ‖ΔW‖_F / ‖W‖_F; None for a W of zeros.
        share90: smallest share of the neurons that holds 90 % of the energy; None without an update. 0.9 where all
            neurons change alike, 1 / neurons at least.
    """

    neurons: int
    energy: float
    relative: float | None
    share90: float | None


@dataclass(frozen=True)
class HubShare(Result):
    """What of an MLP's update falls on its hub neurons.

    Attributes:
        hubs: how many there are.
        share_of_neurons: hubs / neurons, the null.
        share_of_energy: of the update's energy; None without an update.
        null_interval: within it lies the share of as many neurons drawn at random, in about 95 % of draws (mean and
            variance of drawing without replacement are exact, the normal law is not).
    """

    hubs: int
    share_of_neurons: float
    share_of_energy: float | None
    null_interval: tuple[float, float] | None


@dataclass(frozen=True)
class Smearing(Result):
    """Result of `smearing`: by name, of each linear layer, of each MLP, and of the hubs of each MLP that has some.

    `energy`: (neurons,) float64 of each MLP, ‖ΔW‖² by neuron.
    """

    layers: dict[str, Spread]
    mlps: dict[str, Spread]
    hubs: dict[str, HubShare]
    energy: dict[str, Tensor] = apart()

    def tensors(self) -> dict[str, Tensor]:
        return {f"{name}.update_energy": energy for name, energy in self.energy.items()}


@torch.no_grad()
def smearing(before: Weights, after: Weights, hubs: Mapping[str, Sequence[int] | Tensor] | None = None) -> Smearing:
    """Share of the neurons that holds 90 % of ‖ΔW‖²_F, for each linear layer of the blocks and each MLP.

    A layer's neurons are its outputs, and its inputs for the layer that leads out of an MLP's neurons or an attention's
    heads. An MLP's neuron has its rows in the layers into the neurons and its column in the layer out of them. Biases
    are left out. Computed from all weights, so there is no interval.

    Args:
        before, after: modules, or {name: weight}; at least one module, which tells what the layers are.
        hubs: MLP name → distinct indices of its hub neurons.

    Raises:
        ValueError: no module, or one without blocks that are known (`find_blocks`); checkpoints of different structure;
            hubs of no MLP, out of range or given twice.
    """
    model = next((source for source in (before, after) if isinstance(source, nn.Module)), None)
    if model is None:
        raise ValueError(
            "before, after: expected at least one torch.nn.Module, got two mappings of weights; pass the model itself "
            "for one of them, as names alone do not tell where neurons are"
        )
    blocks = find_blocks(model)
    hubs = {name: _checked_hubs(name, index, blocks) for name, index in (hubs or {}).items()}
    parts = [part for block in blocks for part in (block.attention, block.mlp)]
    inward = [(name, layer, 1) for part in parts for name, layer in part.into.items()]
    outward = [(part.out_name, part.out, 0) for part in parts]
    places = {name: (layer, across) for name, layer, across in inward + outward}
    for name, (layer, _) in places.items():
        matrix_of(layer, name)
    names = [f"{name}.weight" for name in linear_layers(model)]
    layers, energies, old_energies = {}, {}, {}
    for full, old, new in paired_matrices(before, after, names):
        name = full.removesuffix(".weight")
        layer, across = places[name]
        across = 1 - across if is_transposed(layer) else across
        energies[name] = (new.double() - old.double()).square().sum(across)
        old_energies[name] = old.double().square().sum().item()
        layers[name] = _spread(energies[name], old_energies[name])
    mlps, shares, by_mlp = {}, {}, {}
    for mlp in (block.mlp for block in blocks):
        inside = [energies[name].view(-1, mlp.neurons).sum(0) for name in mlp.into]
        energy = torch.stack([*inside, energies[mlp.out_name]]).sum(0)
        mlps[mlp.name] = _spread(energy, sum(old_energies[name] for name in (*mlp.into, mlp.out_name)))
        by_mlp[mlp.name] = energy.cpu()
        if mlp.name in hubs:
            shares[mlp.name] = _hub_share(by_mlp[mlp.name], torch.as_tensor(hubs[mlp.name]))
    return Smearing(layers, mlps, shares, by_mlp)


def _spread(energy: Tensor, old_energy: float) -> Spread:
    total = energy.sum().item()
    return Spread(len(energy), total, math.sqrt(total / old_energy) if old_energy else None, smallest_share(energy))


def _checked_hubs(name: str, index: Sequence[int] | Tensor, blocks: Sequence[Block]) -> Tensor:
    mlp = next((block.mlp for block in blocks if block.mlp.name == name), None)
    if mlp is None:
        raise ValueError(f"hubs: {name!r} is no MLP of the model; there are {', '.join(b.mlp.name for b in blocks)}")
    index = torch.as_tensor(index, dtype=torch.int64).flatten().cpu()
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < mlp.neurons:
        raise ValueError(f"hubs of {name}: expected indices in [0, {mlp.neurons}), got {index.min()} to {index.max()}")
    if len(index.unique()) < len(index):
        raise ValueError(
            f"hubs of {name}: expected distinct indices, got {len(index)} of {len(index.unique())} neurons"
        )
    return index


def _hub_share(energy: Tensor, hubs: Tensor) -> HubShare:
    n, k = len(energy), len(hubs)
    total = energy.sum()
    if total == 0:
        return HubShare(k, k / n, None, None)
    # The sum of k of n numbers drawn without replacement has variance k (1 - k/n) S².
    deviation = (k * (1 - k / n) * energy.var()).sqrt() / total if n > 1 else torch.zeros(())
    low, high = k / n - 1.96 * deviation.item(), k / n + 1.96 * deviation.item()
    return HubShare(k, k / n, (energy[hubs].sum() / total).item(), (max(0.0, low), min(1.0, high)))
