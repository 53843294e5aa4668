"""Adapters of several domains in one: what a method that merges them one by one leaves on disk.

Merged adapters change the base, which the folder of the next one would not name. One adapter whose A's and B's are
those of all domains, one below and one beside the other, is the same change of the base as it was: Σ s B_d A_d. So PEFT
loads the model that was trained, up to the rounding of weights that each merge makes in half precision.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl.models.parts import has_adapters

from .carried import FOLDER, move_in
from .lora import merged

_LIST, _CONFIG, _TENSORS = f"{FOLDER}/adapters.json", "adapter_config.json", "adapter_model.safetensors"


@dataclass
class Adapter:
    """One domain's adapter.

    Attributes:
        rank, alpha: its change of a weight is alpha / rank · B A.
        tensors: A (rank, n) and B (m, rank) of each layer, by the names that PEFT gives them in files; on the CPU.
    """

    rank: int
    alpha: float
    tensors: dict[str, Tensor]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class MergedAdapters:
    """What a method that merges each domain's adapter into the base remembers of them.

    Args:
        method: its name, for errors.
    """

    def __init__(self, method: str) -> None:
        self._method = method
        self._earlier: list[Adapter] = []
        self._current: nn.Module | None = None

    @property
    def current(self) -> nn.Module:
        """What :meth:`begin` was given."""
        assert self._current is not None, "begin comes first"
        return self._current

    def merge(self, model: nn.Module) -> nn.Module:
        """The base, with the adapter of the domain before in it.

        Raises:
            ValueError: another adapter than the method's own.
        """
        if has_adapters(model):
            if model is not self._current:
                raise ValueError(
                    f"model: expected a plain model, or what before_domain returned, since {self._method} makes its "
                    f"own adapters; got another {type(model).__name__}. Merge its adapter (merge_and_unload), or train "
                    "it by elastic"
                )
            self._earlier.append(adapter_of(model))
            self._current = None
        return merged(model)

    def begin(self, adapted: nn.Module) -> nn.Module:
        """Takes the new domain's adapter, which it returns.

        Raises:
            ValueError: an earlier one has other layers, or another form than B A, so that they do not stack.
        """
        names = set(adapter_of(adapted).tensors) if self._earlier else set()
        for earlier in self._earlier:
            if names != set(earlier.tensors):
                other = min(names ^ set(earlier.tensors))
                raise ValueError(
                    f"model: the adapter that it has is on other layers than those of {self._method}, or no plain LoRA "
                    f"({other} is in one alone). Merge it (merge_and_unload) and save the model, or go on by elastic"
                )
        self._current = adapted
        return adapted

    def save(self, folder: Path) -> None:
        """As `stack`, of all domains before."""
        stack(folder, self._earlier)

    def restore(self, base: nn.Module, folders: Sequence[Path], see: Callable[[nn.Module], object]) -> nn.Module:
        """The base with all adapters but the last merged, one by one as training did, and the last on top.

        Args:
            see: called with the base before the last adapter is put on it.
        """
        import peft

        model, adapters = base, unstack(folders)
        self._earlier = adapters[:-1]
        for number, adapter in enumerate(adapters, 1):
            config = peft.LoraConfig.from_pretrained(folders[-1])
            config.r, config.lora_alpha, config.inference_mode = adapter.rank, adapter.alpha, False
            model = merged(model)
            if number == len(adapters):
                see(model)
            model = peft.PeftModel(model, config)
            peft.set_peft_model_state_dict(model, adapter.tensors)
        return self.begin(model)


def adapter_of(model: Any) -> Adapter:
    """A copy of the adapter of a `peft.PeftModel`."""
    import peft

    config = model.peft_config["default"]
    if config.use_rslora or config.rank_pattern or config.alpha_pattern:
        raise ValueError(
            "model: its adapter has rslora or ranks by layer, which adapters of several domains in one cannot keep. "
            "Merge it (merge_and_unload) and save the model, or go on by elastic"
        )
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return Adapter(config.r, config.lora_alpha, {n: t.detach().to("cpu", copy=True) for n, t in tensors.items()})


def stack(folder: Path, history: Sequence[Adapter]) -> None:
    """Puts earlier adapters before the one that `save_pretrained` wrote into `folder`.

    Raises:
        ValueError: there is no adapter; nothing is written then.
    """
    config, last = _read(folder)
    adapters = [*history, Adapter(config["r"], config["lora_alpha"], last)]
    if (folder / _LIST).is_file() and config["r"] == sum(rank for rank, _ in _listed(folder)):
        return  # it was stacked before
    if history:
        tensors = dict(last)
        for name in last:
            if (axis := _axis(name)) is not None:
                tensors[name] = torch.cat([_scaled(name, each, adapters[-1]) for each in adapters], axis)
        config["r"] = sum(each.rank for each in adapters)
        # The scale alpha / r stays the last one's, to the bit where all are alike.
        alpha = adapters[-1].alpha * config["r"] / adapters[-1].rank
        config["lora_alpha"] = int(alpha) if alpha == int(alpha) else alpha
        from safetensors.torch import save_file

        move_in(folder / _TENSORS, lambda part: save_file(tensors, part, metadata={"format": "pt"}))
        move_in(folder / _CONFIG, lambda part: part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))
    listed = json.dumps([{"rank": each.rank, "alpha": each.alpha} for each in adapters])
    move_in(folder / _LIST, lambda part: part.write_text(listed + "\n", encoding="utf-8"))


def unstack(folders: Sequence[Path]) -> list[Adapter]:
    """The adapters of all domains, from the last folder; of an older sparse_cl, which did not stack, from each.

    Raises:
        ValueError: a folder without an adapter, or whose files do not belong together.
    """
    if not (folders[-1] / _LIST).is_file():
        read = [_read(folder) for folder in folders]
        return [Adapter(config["r"], config["lora_alpha"], tensors) for config, tensors in read]
    config, tensors = _read(folders[-1])
    listed = _listed(folders[-1])
    ranks = [rank for rank, _ in listed]
    if sum(ranks) != config["r"]:
        raise ValueError(f"{folders[-1]}: the adapter has rank {config['r']}, but {_LIST} names ranks {ranks}")
    adapters = [Adapter(rank, alpha, {}) for rank, alpha in listed]
    for name, tensor in tensors.items():
        axis = _axis(name)
        if axis is None:
            adapters[-1].tensors[name] = tensor
            continue
        for adapter, part in zip(adapters, tensor.split(ranks, axis), strict=True):
            # Its own memory: a view would hold that of all of them.
            adapter.tensors[name] = part.clone(memory_format=torch.contiguous_format)
    for adapter in adapters[:-1]:
        adapter.tensors = {name: _scaled(name, adapter, adapters[-1], back=True) for name in adapter.tensors}
    return adapters


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors.torch import load_file

    for name in (_CONFIG, _TENSORS):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder}: expected an adapter, found no {name}; model.save_pretrained(folder) comes first"
            )
    return json.loads((folder / _CONFIG).read_text(encoding="utf-8")), load_file(folder / _TENSORS)


def _listed(folder: Path) -> list[tuple[int, float]]:
    return [(each["rank"], each["alpha"]) for each in json.loads((folder / _LIST).read_text(encoding="utf-8"))]


def _axis(name: str) -> int | None:
    """Along which A's are stacked, or B's; None of other tensors."""
    return 0 if ".lora_A." in name else 1 if ".lora_B." in name else None


def _scaled(name: str, adapter: Adapter, last: Adapter, back: bool = False) -> Tensor:
    """B for the scale that the stack has, or back for its own."""
    ratio = adapter.scale / last.scale
    tensor = adapter.tensors[name]
    return tensor if ratio == 1 or _axis(name) != 1 else tensor / ratio if back else tensor * ratio
