"""Forward hooks by which a memory sees the inputs of layers."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from .memory import SubspaceMemory


class InputHook:
    """Tells a memory of each input of a layer.

    It does not keep the memory alive, and a copy or a pickle of it tells nobody: a copied model is a model of its own.
    """

    def __init__(self, memory: SubspaceMemory, name: str):
        self._memory: weakref.ref[SubspaceMemory] | None = weakref.ref(memory)
        self._name = name

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        memory = self._memory and self._memory()
        given = inputs or tuple(named.values())
        if memory is not None and given:
            memory.note(self._name, given[0])

    def __getstate__(self) -> dict[str, Any]:
        return {"_memory": None, "_name": self._name}
