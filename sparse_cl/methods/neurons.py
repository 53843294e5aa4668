"""Neurons as methods take them: chosen by their activation, as masks of weights, and trained alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl.masks import ColumnMask, Mask, RowMask
from sparse_cl.models.neuron_masks import neuron_masks, places, top_neurons
from sparse_cl.models.parts import find_mlps
from sparse_cl.nn import activate
from sparse_cl.nn.activation import remember_frozen
from sparse_cl.optim.names import named
from sparse_cl.probes.activation import ActivationProbe

from .base import Batch
from .neuron_account import NeuronAccount


def most_active(model: nn.Module, batches: Iterable[Batch], fraction: float) -> dict[str, Tensor]:
    """MLP → its most active neurons (k,) int64, ascending, by mean |activation| over all tokens that are attended to.

    Raises:
        ValueError: as `ActivationProbe`, `stream` and `top_neurons`.
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


def train_only(model: nn.Module, masks: Mapping[str, RowMask | ColumnMask]) -> None:
    """Freezes all but the masked entries, in place, until `sparse_cl.nn.restore`; what was frozen stays frozen.

    Linear layers without a masked bias compute only the gradient of their masked entries (`ActiveLinear`). Other masked
    parameters get a full gradient, and need their mask in the optimizer (`trained`).
    """
    opened = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    linear = {name: masks[name] for name in opened if name in masks and can_be_active(model, name, masks)}
    if linear:
        activate(model, linear)
    else:
        remember_frozen(model, opened)
    for name in opened:
        model.get_parameter(name).requires_grad_(name in masks and name not in linear)


def train_most_active(
    method: str, model: nn.Module, batches: Iterable[Batch], fraction: float, account: NeuronAccount
) -> dict[str, RowMask | ColumnMask]:
    """Begins a domain: chooses its neurons, notes them in the account, freezes the rest, and returns the masks.

    Args:
        method: its name, for warnings.
    """
    opened = chosen(model, most_active(model, batches, fraction))
    account.begin(method, model, batches, opened)
    masks = masks_of(model, opened)
    train_only(model, masks)
    return masks


def trained(model: nn.Module, masks: Mapping[str, Mask]) -> dict[str, Any]:
    """Arguments `params` and `masks` of an optimizer, after `train_only`; the model may be wrapped since."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = {name: mask for name, mask in masks.items() if named(params, name) is not None}
    return {"params": [*params.items()], "masks": own}


def can_be_active(model: nn.Module, name: str, masks: Mapping[str, Any]) -> bool:
    """Whether a parameter is the weight of an ordinary linear layer whose bias, which would be frozen, has no mask."""
    path, _, own = name.rpartition(".")
    layer = model.get_submodule(path)
    plain = type(layer) is nn.Linear and "forward" not in vars(layer)
    return own == "weight" and plain and f"{path}.bias" not in masks
