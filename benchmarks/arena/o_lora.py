"""O-LoRA: one adapter a domain, drawn away from the input directions of the adapters before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_cl.methods.base import Batch, Method
from sparse_cl.methods.lora import ALPHA, RANK, add_adapter, merged
from sparse_cl.methods.options import check_at_least


class OLoRA(Method):
    """A fresh adapter each domain; loss + λ₁ Σ|A_old A_newᵀ| + λ₂ Σ‖·‖₂ (Wang et al. 2023, and its release).

    The sums go over the adapted layers, all earlier adapters, and for λ₂ over A and B of the new one. Earlier adapters
    stay active and are never changed: as the paper proposes they are merged into the frozen weights, so that a step
    costs what one of LoRA costs, and only their A is kept. A alone is constrained, and softly: nothing keeps
    ΔW_new away from the inputs of earlier domains. `orthogonal-lora` does that.

    Args:
        rank, alpha: of each adapter.
        lambda_1: weight of the overlap, not averaged over layers or entries. The release uses 0.5 to 5.
        lambda_2: weight of the norms. The release uses 0 to 0.3.
    """

    name = "o-lora"
    kind = "baseline"
    options = ("rank", "alpha", "lambda_1", "lambda_2")
    default_lr = 4e-3

    def __init__(self, rank: int = RANK, alpha: int = ALPHA, lambda_1: float = 0.5, lambda_2: float = 0.0) -> None:
        self.rank = check_at_least("rank", rank, 1)
        self.alpha = check_at_least("alpha", alpha, 1)
        self.lambda_1 = check_at_least("lambda_1", lambda_1, 0)
        self.lambda_2 = check_at_least("lambda_2", lambda_2, 0)
        self._old: dict[str, Tensor] = {}
        self._overlapping: list[tuple[Tensor, nn.Parameter]] = []
        self._trained: list[nn.Parameter] = []

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        adapted = add_adapter(merged(model), self.rank, self.alpha)
        self._overlapping = [(self._old[name], a) for name, a in _inputs(adapted).items() if name in self._old]
        self._trained = [p for p in adapted.parameters() if p.requires_grad]
        return adapted

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self._trained, lr=lr)

    def penalty(self, model: nn.Module) -> Tensor | None:
        terms = []
        if self.lambda_1 and self._overlapping:
            terms += [self.lambda_1 * (old @ new.mT).abs().sum() for old, new in self._overlapping]
        if self.lambda_2:
            terms += [self.lambda_2 * torch.linalg.vector_norm(p) for p in self._trained]
        return torch.stack(terms).sum() if terms else None

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        for name, a in _inputs(model).items():
            own = a.detach().clone()
            self._old[name] = torch.cat([self._old[name], own]) if name in self._old else own
        self._overlapping, self._trained = [], []

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        import peft

        model = base
        for folder in folders:
            model = peft.PeftModel.from_pretrained(merged(model), folder)
            self.after_domain(model, [])
        return model


def _inputs(model: nn.Module) -> dict[str, nn.Parameter]:
    """A of each layer's adapter, (rank, inputs), by name."""
    return {name: p for name, p in model.named_parameters() if ".lora_A." in name}
