"""What a continual-learning method decides: what is trained in a domain, and by which optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

Batch = Mapping[str, torch.Tensor]


class Method(ABC):
    """A method's life: `check`; for each domain `before_domain`, `make_optimizer`, training, `after_domain`, `save`.

    One instance serves one sequence of domains, and may keep what it learns about earlier ones. In a sequence that
    was interrupted a fresh instance is given `restore` in place of the domains that were finished.

    Attributes:
        name: as given to `--method`.
        options: keyword arguments of the constructor that a user may give.
        default_lr: used where the user gives none; chosen on the embedded model and the validation part of the embedded
            domains (benchmarks/tune_four_domains.py). Large models want smaller ones.
    """

    name: str
    options: tuple[str, ...] = ()
    default_lr: float

    def settings(self) -> dict[str, Any]:
        """The method's own settings, for the record of the run."""
        return {}

    def check(self, model: nn.Module) -> None:  # noqa: B027
        """Called with the base model before anything is run or written.

        Raises:
            ValueError: the method cannot train this model.
        """

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

    def record(self) -> dict[str, Any]:
        """What to report on the domain that was just learned, as JSON holds it; called after `after_domain`."""
        return {}

    def save(self, folder: Path) -> None:  # noqa: B027
        """Write into `folder`, where the model was just saved, what the method must remember beside it.

        In a distributed run one process calls this.
        """

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        """The model as it was after the last finished domain, and the method's own memory of those finished.

        Args:
            base: the untouched base model.
            folders: one for each finished domain, in order: what `save_pretrained` and `save` wrote. At least one.
        """
        return type(base).from_pretrained(folders[-1], dtype=base.dtype).to(base.device)
