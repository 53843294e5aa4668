"""Sparse masked fine-tuning: only the neurons that are most active on the new domain."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sparse_cl.masks import ColumnMask, RowMask
from sparse_cl.optim import SparseMaskedAdamW
from sparse_cl.probes.activation import ActivationProbe
from sparse_cl.probes.neuron_masks import places
from sparse_cl.probes.parts import find_mlps

from .base import Batch, Method


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
        for mlp in find_mlps(model):
            places(mlp)

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        self.masks = ActivationProbe(model, tokens="all").run(batches).top(self.fraction)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.masks)
        return model

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        trained = [(name, p) for name, p in model.named_parameters() if name in self.masks]
        return SparseMaskedAdamW(trained, lr=lr, masks=self.masks)
