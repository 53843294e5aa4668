"""Orthogonal updates of the new domain's neurons only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_cl.masks import ColumnMask, RowMask
from sparse_cl.nn import restore
from sparse_cl.optim import SubspaceProjectedAdamW

from .base import Batch
from .memory_method import told_already
from .neuron_account import NeuronAccount
from .neurons import train_most_active, trained
from .options import check_share
from .orthogonal import Orthogonal


class OrthogonalMasked(Orthogonal):
    """`Orthogonal` on the top-K neurons that `SparseMasked` chooses; everything else stays bit-identical.

    Rows of the layers into the neurons are projected as without a mask, since the two commute. The update of the layer
    out of them has only the columns of the chosen neurons, and must be orthogonal to what those columns see of the
    basis. If earlier domains use as many directions there as neurons are chosen, that layer is not updated.

    The account has an entry for each matrix of the MLPs, as in `Orthogonal`, and one for each MLP, as in
    `SparseMasked`: what survives the projection without the mask, and the mask without the projection.

    Args:
        fraction: K over the neurons of a layer, in (0, 1].
        energy, source, max_rank: as for `Orthogonal`.
    """

    name = "orthogonal-masked"
    default_lr = 4e-3
    options = ("fraction", *Orthogonal.options)

    def __init__(
        self, fraction: float = 0.25, energy: float = 0.95, source: str = "inputs", max_rank: int | None = None
    ) -> None:
        super().__init__(energy, source, max_rank)
        self.fraction = check_share("fraction", fraction)
        self.masks: dict[str, RowMask | ColumnMask] = {}
        self.account = NeuronAccount()

    def check(self, model: nn.Module) -> None:
        self.account.check(model, self.name)
        super().check(model)
        memory = self._new_memory(model)
        if transposed := [name for name in memory.names if memory.is_transposed(name)]:
            raise ValueError(
                f"{transposed[0].removesuffix('.weight')} is a Conv1D, whose weight is transposed; {self.name} needs "
                "torch.nn.Linear layers, as Llama, Qwen, Mistral, Gemma, Phi and GPT-NeoX have"
            )

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        restore(model)  # of a domain that was left half learned
        model = super().before_domain(model, batches)
        self.masks = train_most_active(self.name, model, batches, self.fraction, self.account)
        return model

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        self._check_begun("make_optimizer")
        with told_already():
            return SubspaceProjectedAdamW(**trained(model, self.masks), lr=lr, memory=self.memory)

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self._check_begun("after_domain")
        restore(model)
        self.account.end(self.account.opened)
        super().after_domain(model, batches)

    def record(self) -> dict[str, Any]:
        directions = super().record()["layers"]
        trained = {name: layer for name, layer in directions.items() if name in self.account.weights}
        return {"layers": {**trained, **self.account.layers}}

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.account.save(folder)

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        self.account.load(folders[-1])
        return super().restore(base, folders)
