"""Sparse masked fine-tuning in a side branch: LoRA adapters confined to the neurons most active on the new domain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_cl.masks import ColumnMask, RowMask
from sparse_cl.models.parts import MLP, find_mlps

from .base import Batch
from .lora import ALPHA, RANK, MergedWeights, add_adapter
from .neurons import chosen, most_active
from .options import check_at_least
from .sparse_masked import SparseMasked
from .stacked import MergedAdapters


class SparseMaskedLoRA(SparseMasked):
    """A fresh LoRA adapter for each domain on the MLPs' matrices, zero outside the domain's top-K neurons.

    In the layers into the neurons, ΔW = s B A is zero outside the neurons' rows, because B's other rows are frozen at
    0. In the layer out of them it is zero outside the neurons' columns, because A's other columns are frozen at 0. The
    previous domain's adapter is merged into the weights first, so its neurons keep what they learned unless they are
    chosen again. Neurons and account are as in `SparseMasked`.

    Args:
        fraction: K over the neurons of a layer, in (0, 1].
        rank, alpha: of the adapters; s = alpha / rank.
    """

    name = "sparse-masked-lora"
    default_lr = 4e-3
    options = ("fraction", "rank", "alpha")

    def __init__(self, fraction: float = 0.1, rank: int = RANK, alpha: int = ALPHA) -> None:
        super().__init__(fraction)
        self.rank = check_at_least("rank", rank, 1)
        self.alpha = check_at_least("alpha", alpha, 1)
        self._adapters = MergedAdapters(self.name)

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        base = self._adapters.merge(model)
        self.check(base)
        opened = chosen(base, most_active(base, batches, self.fraction))
        self.account.begin(self.name, base, batches, opened)
        mlps = find_mlps(base)
        targets = [name for mlp in mlps for name in (*mlp.into, mlp.out_name)]
        adapted = self._adapters.begin(add_adapter(base, self.rank, self.alpha, targets))
        names = {parameter: name for name, parameter in adapted.named_parameters()}
        self.masks = {}
        for mlp in mlps:
            self.masks |= _confine(mlp, adapted.get_submodule("base_model.model"), opened[mlp.name], names)
        return adapted

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self.account.end(self.account.opened, MergedWeights(model, self.account.weights))

    def save(self, folder: Path) -> None:
        self._adapters.save(folder)
        super().save(folder)

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        self.account.load(folders[-1])
        return self._adapters.restore(base, folders, lambda model: None)


@torch.no_grad()
def _confine(
    mlp: MLP, base: nn.Module, opened: Tensor, names: dict[nn.Parameter, str]
) -> dict[str, RowMask | ColumnMask]:
    """Makes the fresh adapters of an MLP zero outside the open neurons; returns the masks that keep them so.

    Args:
        mlp: as found before the adapters were added.
        base: the model that now has them.
        names: of the parameters.
    """
    masks: dict[str, RowMask | ColumnMask] = {}
    copies = 2 if mlp.layout.stacked else 1
    for name in mlp.into:
        b = base.get_parameter(f"{name}.lora_B.default.weight")
        masks[names[b]] = RowMask(opened.repeat(copies).nonzero().flatten(), b.shape)
    a = base.get_parameter(f"{mlp.out_name}.lora_A.default.weight")
    a[:, ~opened.to(a.device)] = 0
    masks[names[a]] = ColumnMask(opened.nonzero().flatten(), a.shape)
    return masks
