"""Parameters that a method freezes for a domain."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class Frozen:
    """Knows which parameters it froze, so that what the caller froze stays frozen."""

    def __init__(self) -> None:
        self._parameters: list[nn.Parameter] = []

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """Freezes these parameters, and thaws what it froze before."""
        self.thaw()
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in self._parameters:
            parameter.requires_grad_(False)

    def thaw(self) -> None:
        """Unfreezes what `freeze` froze."""
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        self._parameters = []
