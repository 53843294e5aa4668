"""Sparse masked fine-tuning: only the neurons that are most active on the new domain."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sparse_cl.masks import ColumnMask, RowMask
from sparse_cl.optim import SparseMaskedAdamW

from .base import Batch, Method
from .mlp import MLP, find_mlps, is_transposed, mean_activation


def neuron_masks(mlp: MLP, neurons: torch.Tensor) -> dict[str, RowMask | ColumnMask]:
    """Masks that free the given neurons of one MLP: parameter name → mask.

    Rows of the layers into the neurons with their biases, columns of the layer out of them. The bias of the layer
    out belongs to no neuron and gets no mask.

    Args:
        neurons: distinct indices into the MLP's neurons, 1-D.
    """
    masks: dict[str, RowMask | ColumnMask] = {}
    for name, layer in mlp.into.items():
        outputs = torch.cat([neurons, neurons + mlp.neurons]) if mlp.layout.stacked else neurons
        along = ColumnMask if is_transposed(layer) else RowMask
        masks[f"{name}.weight"] = along(outputs, layer.weight.shape)
        if layer.bias is not None:
            masks[f"{name}.bias"] = RowMask(outputs, layer.bias.shape)
    along = RowMask if is_transposed(mlp.out) else ColumnMask
    masks[f"{mlp.out_name}.weight"] = along(neurons, mlp.out.weight.shape)
    return masks


def top_neurons(activation: torch.Tensor, fraction: float) -> torch.Tensor:
    """Sorted indices of the largest entries of a 1-D tensor: `fraction` of them, rounded, at least one."""
    count = min(activation.numel(), max(1, round(fraction * activation.numel())))
    return activation.topk(count).indices.sort().values


class SparseMasked(Method):
    """Updates the top-K neurons of each MLP by mean |activation| on the new domain; all else stays bit-identical.

    Args:
        fraction: K over the neurons of a layer, in (0, 1].
    """

    name = "sparse-masked"
    default_lr = 4e-3

    def __init__(self, fraction: float = 0.1) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"the fraction of active neurons must be in (0, 1], got {fraction}")
        self.fraction = fraction
        self.masks: dict[str, RowMask | ColumnMask] = {}

    def settings(self) -> dict[str, Any]:
        return {"fraction": self.fraction}

    def check(self, model: nn.Module) -> None:
        find_mlps(model)

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        mlps = find_mlps(model)
        self.masks = {}
        for mlp, activation in zip(mlps, mean_activation(model, mlps, batches), strict=True):
            self.masks |= neuron_masks(mlp, top_neurons(activation, self.fraction))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.masks)
        return model

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        trained = [(name, p) for name, p in model.named_parameters() if name in self.masks]
        return SparseMaskedAdamW(trained, lr=lr, masks=self.masks)
