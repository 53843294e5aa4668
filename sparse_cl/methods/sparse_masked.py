"""Sparse masked fine-tuning: only the neurons that are most active on the new domain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_cl.masks import ColumnMask, RowMask
from sparse_cl.nn import restore
from sparse_cl.optim import SparseMaskedAdamW

from .base import Batch, Method
from .neuron_account import NeuronAccount
from .neurons import train_most_active, trained
from .options import check_share


class SparseMasked(Method):
    """Updates the top-K neurons of each MLP by mean |activation| on the new domain; all else stays bit-identical.

    While a domain is learned, linear layers are `sparse_cl.nn.ActiveLinear`, which compute only the gradients of these
    neurons (except layers into the neurons that have a bias). The account (`NeuronAccount`) counts a neuron as in use
    once a domain has trained it.

    Args:
        fraction: K over the neurons of a layer, in (0, 1].
    """

    name = "sparse-masked"
    default_lr = 4e-3
    options: tuple[str, ...] = ("fraction",)

    def __init__(self, fraction: float = 0.1) -> None:
        self.fraction = check_share("fraction", fraction)
        self.masks: dict[str, RowMask | ColumnMask] = {}
        self.account = NeuronAccount()

    def check(self, model: nn.Module) -> None:
        self.account.check(model, self.name)

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        restore(model)  # of a domain that was left half learned
        self.check(model)
        self.masks = train_most_active(self.name, model, batches, self.fraction, self.account)
        return model

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return SparseMaskedAdamW(**trained(model, self.masks), lr=lr)

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        restore(model)
        self.account.end(self.account.opened)

    def record(self) -> dict[str, Any]:
        return {"layers": self.account.layers}

    def save(self, folder: Path) -> None:
        self.account.save(folder)

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        self.account.load(folders[-1])
        return super().restore(base, folders)
