"""Sparse masked fine-tuning: only the neurons that are most active on the new domain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl.masks import ColumnMask, RowMask
from sparse_cl.optim import SparseMaskedAdamW
from sparse_cl.probes.activation import ActivationProbe
from sparse_cl.probes.neuron_masks import neuron_count, neuron_masks, places, top_neurons
from sparse_cl.probes.parts import find_mlps

from .base import Batch, Method
from .neuron_account import NeuronAccount


def check_fraction(fraction: float) -> None:
    """Errors as those of `neuron_count`."""
    neuron_count(fraction, 1)


def most_active(model: nn.Module, batches: Iterable[Batch], fraction: float) -> dict[str, Tensor]:
    """MLP → its most active neurons (k,) int64, ascending, by mean |activation| over all tokens that are attended to.

    Raises:
        ValueError: as `ActivationProbe`, `stream` and `neuron_count`.
    """
    means = ActivationProbe(model, tokens="all").run(batches).mean()
    return {layer: top_neurons(mean, fraction) for layer, mean in means.items()}


def masks_of(model: nn.Module, gains: Mapping[str, Tensor]) -> dict[str, RowMask | ColumnMask]:
    """Masks of the weights of neurons whose gain is above 0: parameter name → mask.

    Args:
        gains: MLP → (neurons,): bool for masks without gain.
    """
    masks: dict[str, RowMask | ColumnMask] = {}
    for mlp in find_mlps(model):
        gain = gains[mlp.name]
        opened = gain.nonzero().flatten()
        masks |= neuron_masks(places(mlp), opened, None if gain.dtype == torch.bool else gain[opened])
    return masks


def chosen(model: nn.Module, neurons: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MLP → (neurons,) bool, true for the given indices."""
    return {
        mlp.name: torch.zeros(mlp.neurons, dtype=torch.bool).index_fill(0, neurons[mlp.name].cpu(), True)
        for mlp in find_mlps(model)
    }


class SparseMasked(Method):
    """Updates the top-K neurons of each MLP by mean |activation| on the new domain; all else stays bit-identical.

    The account (`NeuronAccount`) has a neuron in use once a domain trained it.

    Args:
        fraction: K over the neurons of a layer, in (0, 1].
    """

    name = "sparse-masked"
    default_lr = 4e-3
    options = ("fraction",)

    def __init__(self, fraction: float = 0.1) -> None:
        check_fraction(fraction)
        self.fraction = fraction
        self.masks: dict[str, RowMask | ColumnMask] = {}
        self.account = NeuronAccount()

    def settings(self) -> dict[str, Any]:
        return {"fraction": self.fraction}

    def check(self, model: nn.Module) -> None:
        self.account.check(model)

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        opened = chosen(model, most_active(model, batches, self.fraction))
        self.account.begin(self.name, model, batches, opened)
        self.masks = masks_of(model, opened)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.masks)
        return model

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        trained = [(name, p) for name, p in model.named_parameters() if name in self.masks]
        return SparseMaskedAdamW(trained, lr=lr, masks=self.masks)

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self.account.end(self.account.opened)

    def record(self) -> dict[str, Any]:
        return {"layers": self.account.layers}

    def save(self, folder: Path) -> None:
        self.account.save(folder)

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        self.account.load(folders[-1])
        return super().restore(base, folders)
