"""Sequential full fine-tuning: every parameter, plain AdamW."""

from __future__ import annotations

import torch
from torch import nn

from .base import Method


class AdamW(Method):
    """The baseline that forgets: `torch.optim.AdamW` (Loshchilov & Hutter 2019) on all parameters."""

    name = "adamw"
    kind = "baseline"
    default_lr = 2e-3

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=lr)
