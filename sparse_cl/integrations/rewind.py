"""The state of a training some steps ago, in host memory, to go back to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_cl.optim.leaf import weight_of


class Rewind:
    """At most one copy, on the CPU, of the weights that an optimizer trains and of its state.

    Attributes:
        step: how many steps had been taken when the copy was made; None: there is none.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.step: int | None = None
        self._weights: list[Tensor] = []
        self._state: dict[str, Any] = {}

    def take(self, step: int) -> None:
        """Copies the state as it is, in place of an earlier copy."""
        self.drop()  # first, so that there are never two
        self._weights = [weight.detach().to("cpu", copy=True) for weight in self._trained()]
        self._state, self.step = _copied(self.optimizer.state_dict()), step

    def drop(self) -> None:
        """Gives the copy's memory back."""
        self._weights, self._state, self.step = [], {}, None

    @torch.no_grad()
    def go_back(self) -> int:
        """Puts the copy in force and returns its step. Rates and other options of the groups stay as they are now.

        For a moment the optimizer's state is on the device twice, as when a checkpoint is loaded.
        """
        assert self.step is not None, "there is a copy"
        step = self.step
        for weight, kept in zip(self._trained(), self._weights, strict=True):
            weight.copy_(kept)
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(self._state)
        for group, now in zip(self.optimizer.param_groups, options, strict=True):
            group.update(now)
        self.drop()
        return step

    def state_dict(self) -> dict[str, Any]:
        """Numbers, dicts, lists and tensors, none of them copies."""
        return {"step": self.step, "weights": self._weights, "optimizer": self._state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self._weights, self._state = state["step"], list(state["weights"]), state["optimizer"]

    def _trained(self) -> list[Tensor]:
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        # A compact leaf, too: it is not read anew from the weight that it stands for.
        leaves = [p for p in params if weight_of(p) is not p]
        return [weight_of(p) for p in params] + leaves


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(part) for part in value)
    return value
