"""Sequential LoRA: one low-rank adapter, trained through all domains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_cl.layout import is_sharded

from .base import Batch, Method
from .options import check_at_least

RANK, ALPHA = 16, 32
"""Of the adapters of every method, unless it is given others."""


def add_adapter(
    model: nn.Module, rank: int, alpha: int, target_modules: str | Sequence[str] = "all-linear"
) -> nn.Module:
    """The model with a fresh adapter on the named layers, or every linear one but the head: a `peft.PeftModel`.

    The base is frozen.

    Raises:
        ValueError: the model is split over processes already.
    """
    import peft

    refuse_split(model)

    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
            fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
            task_type="CAUSAL_LM",
        ),
    )


def refuse_split(model: nn.Module) -> None:
    """Raises a ValueError if no adapter can be put into the model, as it is split over processes."""
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            "model: it is split over processes, and an adapter is made of a whole model. Call before_domain before "
            "fully_shard; of a model that has learned by an adapter, save this, and go on in a new run: "
            "method.restore(base, [folder]), before_domain, then fully_shard"
        )


@torch.no_grad()
def agree_on_adapters(model: nn.Module) -> None:
    """Gives all processes the adapter that the first has drawn. All of them must call it."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    trained = [param for param in model.parameters() if param.requires_grad]
    told = [[param.detach().cpu() for param in trained]]
    dist.broadcast_object_list(told)
    for param, value in zip(trained, told[0], strict=True):
        param.copy_(value)


def merged(model: nn.Module) -> nn.Module:
    """The model without adapters: what one holds is added to the weights."""
    return getattr(model, "merge_and_unload", lambda: model)()


class MergedWeights(Mapping):
    """The weights as they would be with the adapter's part added, by name; the model stays as it is.

    Each is made when it is asked for, as all together are as large as the model. Half-precision weights are rounded, as
    they are when an adapter is merged.

    Args:
        weights: of the base model, adapted or not.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
        self._weights = weights
        adapted: Iterator[Any] = (layer for layer in model.modules() if hasattr(layer, "get_delta_weight"))
        self._layers: dict[nn.Parameter, Any] = {layer.get_base_layer().weight: layer for layer in adapted}

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        layer = self._layers.get(weight)
        if layer is None:
            return weight.detach()
        return (weight + layer.get_delta_weight("default")).detach().to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class LoRA(Method):
    """Low-rank adapters on every linear layer but the head (Hu et al. 2022), by PEFT; the base stays frozen.

    The adapter that one domain trained is what the next one starts from.

    Args:
        rank, alpha: of the adapter, whose change of a weight is alpha / rank · B A.
        weight_decay: AdamW's, of A and B.
    """

    name = "lora"
    kind = "baseline"
    trains_adapters = True
    options = ("rank", "alpha", "weight_decay")
    default_lr = 4e-3

    def __init__(self, rank: int = RANK, alpha: int = ALPHA, weight_decay: float = 0.01) -> None:
        self.rank = check_at_least("rank", rank, 1)
        self.alpha = check_at_least("alpha", alpha, 1)
        self.weight_decay = check_at_least("weight_decay", weight_decay, 0)

    def check(self, model: nn.Module) -> None:
        """Any: the base may be quantized."""

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        import peft

        if isinstance(model, peft.PeftModel):
            return model
        adapted = add_adapter(model, self.rank, self.alpha)
        agree_on_adapters(adapted)
        return adapted

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=lr, weight_decay=self.weight_decay)

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        import peft

        return peft.PeftModel.from_pretrained(base, folders[-1], is_trainable=True)
