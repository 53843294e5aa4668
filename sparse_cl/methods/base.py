"""What a continual-learning method decides: what is trained in a domain, and by which optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

Batch = Mapping[str, torch.Tensor]


class Method(ABC):
    """A method's life: for each domain `before_domain`, `make_optimizer`, training, `after_domain`.

    One instance serves one sequence of domains, and may keep what it learns about earlier ones.

    Attributes:
        name: as given to `--method`.
        default_lr: used where the user gives none; chosen on the embedded model and the validation part of the embedded
            domains (benchmarks/tune_four_domains.py). Large models want smaller ones.
    """

    name: str
    default_lr: float

    def settings(self) -> dict[str, Any]:
        """The method's own settings, for the record of the run."""
        return {}

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        """Prepare for a new domain and return the model to train (the same, or wrapped).

        Args:
            model: what `before_domain` of the domain before returned; at first the base model.
            batches: of the new domain, with input_ids, attention_mask and labels, each (batch, length), on the
                model's device. It can be iterated over more than once.
        """
        return model

    @abstractmethod
    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """A fresh optimizer for the domain."""

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:  # noqa: B027
        """Called once the domain is learned, with the same arguments as `before_domain`."""

    def restore(self, base: nn.Module, folder: Path) -> nn.Module:
        """The model that was saved in `folder` (by `save_pretrained`) after a domain; `base` is the base model."""
        return type(base).from_pretrained(folder, dtype=base.dtype).to(base.device)
