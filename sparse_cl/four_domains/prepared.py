"""What all methods of a run share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparse_cl.models.loading import load_model

from .domains import Domain
from .settings import Settings


@dataclass(frozen=True)
class Prepared:
    """A run that was checked: it can begin.

    Attributes:
        source: folder or Hub name of the base model.
        tokenizer: the base model's.
        domains: in training order.
        reference: text that is scored; None: there is none.
        protected: text that methods are given to protect; None: there is none.
    """

    settings: Settings
    source: str
    tokenizer: Any
    domains: Sequence[Domain]
    reference: str | None = None
    protected: str | None = None

    def load_base(self) -> nn.Module:
        """A fresh base model."""
        return load_model(self.source)[0]

    def scored(self, learned: int) -> int:
        """How many domains, from the first, are scored when so many are learned; before any all are."""
        return learned if learned and self.settings.score == "learned" else len(self.domains)

    def scores(self, learned: int) -> int:
        """How many scores that stage has; a progress bar ticks for each."""
        return self.scored(learned) * len(self.settings.metrics) + 2 * (self.reference is not None)
