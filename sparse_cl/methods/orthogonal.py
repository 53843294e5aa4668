"""Orthogonal fine-tuning: no update enters the directions of a layer's input that earlier domains used."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from sparse_cl.lora import orthogonal_lora
from sparse_cl.optim import Protection, SubspaceProjectedAdamW, protect
from sparse_cl.optim.memory_adamw import AdapterBases
from sparse_cl.subspace import Subspace

from .lora import ALPHA, RANK
from .memory_method import FreshAdapters, MemoryMethod, told_already, trained_by_name


class Orthogonal(MemoryMethod):
    """Full fine-tuning whose every update, weight decay included, is projected (GPM's subspaces, Saha et al. 2021).

    Linear layers are protected by their subspaces. From the second domain on, everything else (embeddings, a head tied
    to them, norms, biases) is frozen, the optimizer's default: it has no subspace and would undo the rest.
    """

    name = "orthogonal"
    trains_adapters = True
    default_lr = 2e-3

    def __init__(self, energy: float = 0.95, source: str = "inputs", max_rank: int | None = None) -> None:
        super().__init__(energy, source, max_rank)

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        self._check_begun("make_optimizer")
        with told_already():
            return SubspaceProjectedAdamW(trained_by_name(model), lr=lr, memory=self.memory)

    @property
    def own_optimizer(self) -> bool:
        return type(self).make_optimizer is not Orthogonal.make_optimizer

    def guard(self, optimizer: torch.optim.Optimizer) -> Protection | None:
        """As `Method.guard`. Norms and biases are trained, which `make_optimizer` freezes; a warning says so."""
        if self.own_optimizer:
            return super().guard(optimizer)
        self._check_begun("guard")
        if not self._known.domains:
            return None
        params = (param for group in optimizer.param_groups for param in group["params"])
        if free := sum(param.requires_grad and param.dim() < 2 for param in params):
            warnings.warn(
                f"{self.name}: behind this {type(optimizer).__name__} {free} norms and biases are trained unprotected, "
                "which moves old outputs; freeze them (requires_grad_(False)) before the optimizer is made, or take "
                "SubspaceProjectedAdamW, which freezes them",
                stacklevel=3,
            )
        with told_already():
            return protect(optimizer, self._known, budget=0)


class OrthogonalLoRA(FreshAdapters):
    """A fresh LoRA adapter each domain, in the complement of its layers' subspaces; the one before is merged.

    O-LoRA (Wang et al. 2023) keeps adapters apart from each other; here they are kept apart from the inputs that
    earlier domains had, which is what the earlier domains' outputs depend on.
    """

    name = "orthogonal-lora"
    default_lr = 4e-3

    def __init__(
        self,
        energy: float = 0.99,
        source: str = "inputs",
        max_rank: int | None = None,
        rank: int = RANK,
        alpha: int = ALPHA,
    ) -> None:
        super().__init__(energy, source, max_rank, rank, alpha)
        #: By name, since fully_shard puts other parameters in the place of those that are there now.
        self._subspaces: dict[str, Subspace] = {}
        self._free: list[str] = []

    def _confine(self, adapted: nn.Module) -> None:
        with told_already():
            found = orthogonal_lora(adapted, self._known)
        names: dict[Any, str] = {param: name for name, param in adapted.named_parameters()}
        self._subspaces = {names[param]: subspace for param, subspace in found.items()}
        self._free = [names[param] for param in found.free]

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        self._check_begun("make_optimizer")
        self._follow(model)
        own: dict[str, Any] = dict(self._adapters.current.named_parameters())
        subspaces = {own[name]: subspace.to(own[name].device) for name, subspace in self._subspaces.items()}
        bases = AdapterBases(subspaces, [own[name] for name in self._free])
        with told_already():
            # B has no subspace, and needs none.
            return SubspaceProjectedAdamW(trained_by_name(model), lr=lr, memory=bases, rest="train")
