"""Where a domain begins: a base model, or what an earlier call left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_cl.methods import Method
from sparse_cl.methods.carried import Carried, fingerprint, load_carried
from sparse_cl.methods.lora import LoRA, merged
from sparse_cl.methods.memory_method import FreshAdapters, MemoryMethod
from sparse_cl.models.loading import load_model
from sparse_cl.models.processes import processes
from sparse_cl.models.sharding import split_over_all


class Source:
    """A model by its folder or Hub name, which may hold an adapter alone.

    Attributes:
        base: folder or name of the base model: the model itself, or what its adapter is for.
        adapter: folder of the adapter; None: there is none.
        tokenizer: folder or name of the tokenizer, which trainers save beside an adapter, with its chat template.

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
        beside = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        self.tokenizer = name if beside else self.base

    def fingerprint(self) -> str | None:
        """Of all that is loaded; None: of a model on the Hub."""
        own, base = fingerprint(self.name), fingerprint(self.base)
        return own if self.adapter is None or base is None else f"{own} on {base}"

    def load(self, method: Method, dtype: torch.dtype, shard: bool = False) -> tuple[nn.Module, Carried | None]:
        """The model for a method to go on with, and what it must not forget; None: nothing was learned here yet.

        Args:
            shard: whether it is split over processes; if the method trains an adapter, it is so once that is made.

        Raises:
            ValueError: the method cannot go on with it.
        """
        shard = shard and not isinstance(method, FreshAdapters | LoRA)
        model: Any = load_model(self.base, dtype, "cpu" if shard else None)[0]
        if Path(self.base).is_dir():
            model.config._name_or_path = str(Path(self.base).resolve())  # an adapter names it, wherever it is loaded
        carried = load_carried(self.name)
        trained_on = carried.domains[-1].get("base_files") if carried and carried.domains else None
        if self.adapter is not None and trained_on not in (None, fingerprint(self.base)):
            raise ValueError(
                f"model: {self.base} is not what the adapter in {self.name} was trained on: its files changed"
            )
        if self.adapter is not None and isinstance(method, FreshAdapters):
            if carried is None:
                raise ValueError(
                    f"model: {self.name} holds an adapter without a memory, which {method.name} could not protect; "
                    "merge it (merge_and_unload) and save the model, or go on by elastic, orthogonal or lora"
                )
            return method.restore(model, [self.adapter], remembers=carried.memory is not None), carried
        if self.adapter is not None and isinstance(method, LoRA):
            return method.restore(model, [self.adapter]), carried
        if self.adapter is not None:
            import peft

            model = merged(peft.PeftModel.from_pretrained(model, self.adapter)).requires_grad_(True)
        if shard:
            model = split_over_all(model, processes().device)
        if carried is not None and carried.memory is not None and isinstance(method, MemoryMethod):
            method.remember(model, carried.memory)
        return model, carried
