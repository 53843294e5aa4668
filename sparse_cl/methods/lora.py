"""Sequential LoRA: one low-rank adapter, trained on and on through the domains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .base import Batch, Method

RANK, ALPHA = 16, 32
"""Of the adapters of every method, unless it is given others."""


def add_adapter(model: nn.Module, rank: int, alpha: int) -> nn.Module:
    """The model with a fresh adapter on every linear layer but the head: a `peft.PeftModel`, the base frozen."""
    import peft

    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules="all-linear",
            fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
            task_type="CAUSAL_LM",
        ),
    )


class LoRA(Method):
    """Low-rank adapters on every linear layer but the head (Hu et al. 2022), by PEFT; the base stays frozen.

    The adapter that one domain trained is what the next one starts from.
    """

    name = "lora"
    kind = "baseline"
    default_lr = 4e-3

    def __init__(self, rank: int = RANK, alpha: int = ALPHA) -> None:
        self.rank, self.alpha = rank, alpha

    def settings(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha}

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        import peft

        return model if isinstance(model, peft.PeftModel) else add_adapter(model, self.rank, self.alpha)

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        import peft

        return peft.PeftModel.from_pretrained(base, folders[-1], is_trainable=True)
