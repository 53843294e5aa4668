"""Online elastic weight consolidation: a spring on each weight, as stiff as the weight mattered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_cl import storage
from sparse_cl.methods.adamw import AdamW
from sparse_cl.methods.base import Batch, check_first, refuse_resized
from sparse_cl.methods.options import check_at_least
from sparse_cl.probes.fisher import diagonal_fisher

_FILE = "fisher.safetensors"


class EWC(AdamW):
    """AdamW on the loss + λ/2 Σ F (θ − θ*)², with F ← γ F + F_new after each domain (Schwarz et al. 2018).

    θ* are the weights after the last domain, and F_new the diagonal Fisher information there of the domain's probe
    batches, with labels drawn from the model, mean over answer tokens (`diagonal_fisher`). As the loss is a mean over
    tokens too, λ is by Laplace's approximation the number of old tokens for each new one; what works best is found by
    trying decades. A protected text is a domain before the first.

    Args:
        ewc_lambda: λ.
        gamma: γ, in [0, 1]; below 1 older domains count less and less.
    """

    name = "ewc"
    protects = True
    options = ("ewc_lambda", "gamma")

    def __init__(self, ewc_lambda: float = 100.0, gamma: float = 1.0) -> None:
        self.ewc_lambda = check_at_least("ewc_lambda", ewc_lambda, 0)
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma: expected a number in [0, 1], got {gamma}")
        self.gamma = gamma
        self.fisher: dict[str, Tensor] = {}
        self._springs: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def protect(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        check_first(self.name, not self._springs)
        self.after_domain(model, batches)

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        refuse_resized(self.name, {name: fisher.shape for name, fisher in self.fisher.items()}, model)
        return super().before_domain(model, batches)

    def penalty(self, model: nn.Module) -> Tensor | None:
        if not self._springs:
            return None
        stretched = [fisher.mul((p - rest).square()).sum() for p, rest, fisher in self._springs]
        return self.ewc_lambda / 2 * torch.stack(stretched).sum()

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        # Seeded as the run is, so that a run which is resumed draws the same labels.
        new = diagonal_fisher(model, batches, seed=torch.initial_seed())
        for name, fisher in new.items():
            if name in self.fisher:
                fisher.add_(self.fisher[name], alpha=self.gamma)
        self._hold(model, new)

    def save(self, folder: Path) -> None:
        storage.write(folder / _FILE, "fisher", self.fisher)

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        model = super().restore(base, folders)
        fisher, _ = storage.read(folders[-1] / _FILE, "fisher", "EWC.save")
        self._hold(model, {name: fisher[name].to(p.device) for name, p in model.named_parameters()})
        return model

    def _hold(self, model: nn.Module, fisher: dict[str, Tensor]) -> None:
        """From now on the model's present weights are θ*."""
        self.fisher = fisher
        self._springs = [(p, p.detach().clone(), fisher[name]) for name, p in model.named_parameters()]
