"""Where a domain begins: a base model, or what an earlier call left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_cl.methods import Method
from sparse_cl.methods.carried import Carried, load_carried
from sparse_cl.methods.lora import LoRA, merged
from sparse_cl.methods.memory_method import FreshAdapters, MemoryMethod
from sparse_cl.models.loading import load_model


class Source:
    """A model by its folder or Hub name, which may hold an adapter alone.

    Attributes:
        base: folder or name of the base model: the model itself, or what its adapter is for.
        adapter: folder of the adapter; None: there is none.

    Raises:
        ValueError: an adapter that does not say what it is for.
    """

    def __init__(self, name: str) -> None:
        self.name, self.base, self.adapter = name, name, None
        if (Path(name) / "adapter_config.json").is_file():
            import peft

            base = peft.PeftConfig.from_pretrained(name).base_model_name_or_path
            if not base:
                raise ValueError(f"model: {name} holds an adapter that does not name its base model")
            self.base, self.adapter = base, Path(name)

    def load(self, method: Method, dtype: torch.dtype) -> tuple[nn.Module, Carried | None]:
        """The model for a method to go on with, and what it must not forget; None: nothing was learned here yet.

        Raises:
            ValueError: the method cannot go on with it.
        """
        model: Any = load_model(self.base, dtype)[0]
        if Path(self.base).is_dir():
            model.config._name_or_path = str(Path(self.base).resolve())  # an adapter names it, wherever it is loaded
        carried = load_carried(self.name)
        if self.adapter is not None and isinstance(method, FreshAdapters | LoRA):
            return method.restore(model, [self.adapter]), carried
        if self.adapter is not None:
            import peft

            model = merged(peft.PeftModel.from_pretrained(model, self.adapter)).requires_grad_(True)
        if carried is not None and carried.memory is not None and isinstance(method, MemoryMethod):
            method.remember(model, carried.memory)
        return model, carried
