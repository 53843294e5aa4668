"""Elastic fine-tuning: each layer is pulled back in the directions of its input that earlier domains use."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparse_cl.optim import ElasticAdamW, LowRankPull, ProjectedAdamW, Protection, protect
from sparse_cl.optim.elastic_adamw import ROW_STRENGTH, STRENGTH

from .lora import ALPHA, RANK
from .memory_method import FreshAdapters, MemoryMethod, trained_by_name
from .options import check_at_least


class Elastic(MemoryMethod):
    """Full fine-tuning, pulled back to where the domain began in the directions that earlier domains use.

    With A = Σ w_d E_d[x xᵀ] of a layer's inputs over the earlier domains, and u_j, λ_j its leading eigenvectors and
    eigenvalues, each step of AdamW ends with the proximal step of ½ Σ κ_j ‖(W - W₀) u_j‖², W₀ the weights when the
    domain began, κ_j = strength / rms W₀ · λ_j / μ, μ the mean λ of
    one domain (`ElasticAdamW`). That is a quadratic penalty on how much the layer's outputs for earlier inputs change:
    EWC (Kirkpatrick et al. 2017) with the input half of a Kronecker-factored Fisher (Ritter, Botev & Barber 2018),
    where hard projection (GPM, Saha et al. 2021) closes some directions and leaves the others free. A head, tied or
    not, is a layer like any other, and an embedding one whose inputs are one-hot: its rows are pulled, by how often
    earlier domains look them up. Norms and biases are free. With nothing to protect, in a first domain, all this is
    AdamW.

    Of a model that PEFT wrapped the adapter is trained that it has, and A and B are two such layers: what goes into B
    is A x. The base may be quantized.

    Args:
        strength: of the pull that one domain adds: along a direction of mean use a weight that is pushed on and on
            stops after about 1 / strength of the root mean square of its matrix.
        row_strength: of embeddings' rows, relative to ``strength``.
        every: steps between two pulls. More than one makes the pull cheaper; steps after the last are not pulled.
        energy, max_rank: of the memory.
        text_weight: weight of the text given to `protect`; a domain has weight 1.
    """

    name = "elastic"
    by_use = True
    trains_adapters = True
    options: tuple[str, ...] = ("strength", "row_strength", "every", "energy", "max_rank", "text_weight")
    default_lr = 2e-3

    def __init__(
        self,
        strength: float = STRENGTH,
        row_strength: float = ROW_STRENGTH,
        every: int = 1,
        energy: float = 0.99,
        max_rank: int | str | None = "auto",
        text_weight: float = 0.2,
    ) -> None:
        super().__init__(energy, "inputs", max_rank, text_weight)
        self.strength = check_at_least("strength", strength, 0)
        self.row_strength = check_at_least("row_strength", row_strength, 0)
        self.every = check_at_least("every", every, 1)

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        self._check_begun("make_optimizer")
        memory = self.memory if self._known.domains else None
        return self._adamw(
            trained_by_name(model),
            lr=lr,
            memory=memory,
            # A first domain, with nothing to protect, is AdamW's.
            second_moment="entry" if memory is None else "row",
            strength=self.strength,
            row_strength=self.row_strength,
            every=self.every,
        )

    def _adamw(self, *arguments: Any, **options: Any) -> ElasticAdamW:
        return ElasticAdamW(*arguments, **options)

    def guard(self, optimizer: torch.optim.Optimizer) -> Protection | None:
        self._check_begun("guard")
        if not self._known.domains:
            return None
        return protect(optimizer, self._known, strength=self.strength, row_strength=self.row_strength, every=self.every)


class ElasticLoRA(FreshAdapters):
    """A fresh LoRA adapter each domain whose A is pulled to 0 in directions that earlier domains use.

    The adapter of the domain before is merged. ΔW = s B A reaches an old input x through A x alone, so the pull of
    `Elastic` is on A, with 0 as its start; B is free. A begins as PEFT draws it, each direction divided by 1 + u_j, u
    its usage. Embeddings, head, norms and biases stay as they are.

    Args:
        strength: as of `Elastic`; adapters want a weaker pull, as their rates are larger and B gives them a scale.
        energy, max_rank: of the memory.
        rank, alpha: of the adapters; s = alpha / rank.
    """

    name = "elastic-lora"
    by_use = True
    options: tuple[str, ...] = ("strength", "energy", "max_rank", "rank", "alpha")
    default_lr = 4e-3

    def __init__(
        self,
        strength: float = 0.35,
        energy: float = 0.99,
        max_rank: int | str | None = "auto",
        rank: int = RANK,
        alpha: int = ALPHA,
    ) -> None:
        super().__init__(energy, "inputs", max_rank, rank, alpha)
        self.strength = check_at_least("strength", strength, 0)

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        self._check_begun("make_optimizer")
        self._follow(model)
        pulls = {}
        for a, subspace in self._subspaces(model):
            pulls[a] = LowRankPull(subspace, subspace.usage * self.strength, from_zero=True, relative=True)
        return ProjectedAdamW(trained_by_name(model), lr=lr, projections=pulls, rest="train")

    @torch.no_grad()
    def _confine(self, adapted: nn.Module) -> None:
        for a, subspace in self._subspaces(adapted):
            basis, usage = subspace.basis.to(a.dtype), subspace.usage.to(a.dtype)
            a.sub_((a @ basis * (usage / (1 + usage))) @ basis.mT)

    def _subspaces(self, adapted: nn.Module) -> list[tuple[nn.Parameter, Any]]:
        """Each A, and what earlier domains use of its inputs."""
        found = []
        layers: list[Any] = [module for module in adapted.modules() if hasattr(module, "lora_A")]
        for layer in layers:
            weight = layer.get_base_layer().weight
            subspace = self._known.subspace(weight) if self._known.tracks(weight) else None
            if subspace is not None:
                found.append((layer.lora_A["default"].weight, subspace))
        return found
