"""OSFT: a weight's own largest singular directions stay, and no step enters them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparse_cl.methods.base import Batch, Method
from sparse_cl.methods.options import check_share
from sparse_cl.models.parts import linear_layers


class OSFT(Method):
    """Orthogonal subspace fine-tuning (Nayak et al. 2025) with the projection in the optimizer.

    With U and V the largest singular directions of each linear layer's weight where the domain begins, gradients and,
    after each step of AdamW, the whole change are projected: ΔW ← (1 - U Uᵀ) ΔW (1 - V Vᵀ). That is what mini_trainer
    does on the factors; `osf` is PEFT's form, whose updates leak. Embeddings, norms and head are trained as ever, as in
    the authors' own code.

    Args:
        effective_rank: share of each layer's singular directions that stay.
    """

    name = "osft"
    kind = "baseline"
    options = ("effective_rank",)
    default_lr = 2e-3

    def __init__(self, effective_rank: float = 0.5) -> None:
        self.effective_rank = float(check_share("effective_rank", effective_rank, one=False))
        self._kept: list[tuple[nn.Parameter, Tensor, Tensor, Tensor]] = []

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        super().before_domain(model, batches)
        weights = [layer.weight for layer in linear_layers(model).values()]
        self._kept = []
        for weight in weights:
            u, values, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
            rank = max(1, round(self.effective_rank * len(values)))
            self._kept.append((weight, weight.detach().clone(), u[:, :rank].to(weight), v[:rank].mT.to(weight)))
        return model

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        optimizer.register_step_pre_hook(lambda *_: self._project_gradients())
        optimizer.register_step_post_hook(lambda *_: self._project_changes())
        return optimizer

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self._kept = []

    @torch.no_grad()
    def _project_gradients(self) -> None:
        for weight, _, u, v in self._kept:
            if weight.grad is not None:
                weight.grad.copy_(_outside(weight.grad, u, v))

    @torch.no_grad()
    def _project_changes(self) -> None:
        for weight, start, u, v in self._kept:
            weight.copy_(start + _outside(weight - start, u, v))


def _outside(change: Tensor, u: Tensor, v: Tensor) -> Tensor:
    change = change - u @ (u.mT @ change)
    return change - (change @ v) @ v.mT
