"""The capacity account of methods that choose neurons: which of each MLP's neurons domains took, and what is left."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl import storage
from sparse_cl.models.neuron_masks import Place, places
from sparse_cl.models.parts import find_mlps, refuse_encoders, refuse_quantized, refuse_shared
from sparse_cl.probes.capacity import SCARCE, scarcity

from .base import Batch
from .surviving import each_gradient

_FILE = "neurons.safetensors"


class NeuronAccount:
    """What a method leaves open of each MLP in a domain, and what domains have used so far.

    `layers` has one entry per MLP for the present domain:

    - `width`: its neurons;
    - `surviving`: the share of the energy of the domain's gradient, before it is learned, that the gains let through:
      Σ_j gain_j² ‖G_j‖² / Σ_j ‖G_j‖², where G_j is the gradient of neuron j's weights and biases, and ‖G_j‖² is
      summed over halves of the first batches;
    - `leak`: the share of the energy of the MLP's change over the domain that is in closed neurons; None: none is
      closed;
    - `used`, `free`: neurons in use once the domain is learned, and the others.

    Attributes:
        used: MLP → (neurons,) bool, on the CPU: in use after the domains learned so far.
        layers: as above, of the present domain.
    """

    def __init__(self) -> None:
        self.used: dict[str, Tensor] = {}
        self.layers: dict[str, dict[str, Any]] = {}
        self._where: dict[str, tuple[Place, ...]] = {}
        self._gains: dict[str, Tensor] = {}
        self._weights: dict[str, nn.Parameter] = {}
        self._before: dict[str, Tensor] = {}

    @staticmethod
    def check(model: nn.Module, method: str) -> None:
        """Whether the model's neurons can be found.

        Raises:
            ValueError: no MLP that is known here, one without plain weight matrices, or two that share one.
        """
        refuse_quantized(model, method)
        refuse_encoders(model, method)
        refuse_shared(model)
        for mlp in find_mlps(model):
            places(mlp)

    def begin(self, name: str, model: nn.Module, batches: Iterable[Batch], gains: Mapping[str, Tensor]) -> None:
        """Measure what survives, and warn where little does or few neurons are left.

        Args:
            name: of the method, for warnings.
            model: before the domain, without adapters, its linear layers ordinary ones.
            gains: MLP → (neurons,), on the CPU: 0 for those that are closed in this domain.
        """
        parameters = dict(model.named_parameters())
        mlps = find_mlps(model)
        self._where = {mlp.name: places(mlp) for mlp in mlps}
        self._gains = {layer: gain.double() for layer, gain in gains.items()}
        self._weights = {p.parameter: parameters[p.parameter] for where in self._where.values() for p in where}
        for mlp in mlps:
            self.used.setdefault(mlp.name, torch.zeros(mlp.neurons, dtype=torch.bool))
        energies = self._gradient_energies(model, batches)
        self.layers = {}
        for layer, gain in self._gains.items():
            total = float(energies[layer].sum())
            lost = float((1 - gain.square()) @ energies[layer])
            self.layers[layer] = {"width": len(gain), "surviving": 1 - lost / total if total else 1.0}
        self._before = {n: weight.detach().to("cpu", copy=True) for n, weight in self._weights.items()}
        for message in (scarcity(self.layers), self._shortage()):
            if message:
                warnings.warn(f"{name}: {message}", stacklevel=3)

    def end(self, used: Mapping[str, Tensor], learned: Mapping[str, Tensor] | None = None) -> None:
        """Measure the leak of a domain that was learned, and count what is in use now.

        Args:
            used: MLP → (neurons,) bool: what the domain took, in addition to what was in use.
            learned: the weights of neurons as the next domain will find them; None: as the parameters now are.
        """
        learned = self._weights if learned is None else learned
        for layer, where in self._where.items():
            changes = (p.energies(learned[p.parameter].detach().cpu() - self._before[p.parameter]) for p in where)
            change = sum(changes, torch.zeros(()))
            closed = self._gains[layer] == 0
            total = float(change.sum())
            leak = (float(change[closed].sum()) / total if total else 0.0) if bool(closed.any()) else None
            self.used[layer] = self.used[layer] | used[layer].cpu()
            count = int(self.used[layer].sum())
            self.layers[layer] |= {"leak": leak, "used": count, "free": len(closed) - count}
        self._before = {}

    @property
    def opened(self) -> dict[str, Tensor]:
        """MLP → (neurons,) bool: not closed in the present domain."""
        return {layer: gain > 0 for layer, gain in self._gains.items()}

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters that belong to neurons, by name, as `begin` found them."""
        return self._weights

    def save(self, folder: Path) -> None:
        storage.write(folder / _FILE, "neurons", self.used)

    def load(self, folder: Path) -> None:
        """Go on with what `save` wrote."""
        self.used, _ = storage.read(folder / _FILE, "neurons", "the method's save")

    def _shortage(self) -> str | None:
        left = {layer: 1 - float(used.double().mean()) for layer, used in self.used.items()}
        short = [layer for layer, share in left.items() if share < SCARCE]
        if not short:
            return None
        least = min(short, key=left.__getitem__)
        return (
            f"earlier domains use all but {SCARCE:.0%} of the neurons of {len(short)} of {len(left)} MLPs; the least, "
            f"{left[least]:.2%}, is free in {least}. What is learned now overwrites what they learned"
        )

    def _gradient_energies(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """MLP → (neurons,) float64, on the CPU."""
        owner = {place.parameter: (layer, place) for layer, where in self._where.items() for place in where}
        sums = {
            layer: torch.zeros(
                len(self.used[layer]), dtype=torch.float64, device=self._weights[where[0].parameter].device
            )
            for layer, where in self._where.items()
        }

        def count(name: str, gradient: Tensor) -> None:
            layer, place = owner[name]
            sums[layer] += place.energies(gradient)

        each_gradient(model, self._weights, batches, count)
        return {layer: total.cpu() for layer, total in sums.items()}
