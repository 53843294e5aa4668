"""Baselines that average weights: those before and after a domain, and those of adapters that learned apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl.methods.adamw import AdamW
from sparse_cl.methods.base import Batch
from sparse_cl.methods.lora import LoRA, add_adapter

PAIR, RUNNING = "pair", "running"


class SFA(AdamW):
    """Sequential fine-tuning averaging (Kleiman et al. 2025): after each domain W ← (1 - a) W_after + a W_before.

    Args:
        mean: "pair": a = 1/2; "running": a = t / (t + 1) after the t-th domain, the mean of the base model and of all
            that was trained from the mean of the day.
    """

    name = "sfa"
    options = ("mean",)

    def __init__(self, mean: str = PAIR) -> None:
        if mean not in (PAIR, RUNNING):
            raise ValueError(f"mean: expected {PAIR!r} or {RUNNING!r}, got {mean!r}")
        self.mean = mean
        self._began: dict[str, Tensor] = {}
        self._finished = 0

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        self._began = _copy(model)
        return super().before_domain(model, batches)

    @torch.no_grad()
    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self._finished += 1
        share = 0.5 if self.mean == PAIR else self._finished / (self._finished + 1)
        for name, parameter in model.named_parameters():
            parameter.lerp_(self._began[name].to(parameter.device), share)
        self._began = {}

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        self._finished = len(folders)
        return super().restore(base, folders)


class LoRAMean(LoRA):
    """An adapter for each domain, trained beside the base model alone; the model is the base plus their mean change.

    Where adapters learned apart, their mean is the simplest of merges (Wortsman et al. 2022). The base and the mean are
    held on the CPU.
    """

    name = "lora-mean"
    trains_adapters = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._base: dict[str, Tensor] = {}
        self._mean: dict[str, Tensor] = {}
        self._finished = 0
        self._wrapper: Any = None

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        if not self._base:
            self._base = _copy(model)
            self._mean = dict(self._base)
        _write(model, self._base)
        # The layers are replaced inside the model, which so stays what the Trainer saves as an ordinary model.
        self._wrapper = add_adapter(model, self.rank, self.alpha)
        return model

    @torch.no_grad()
    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self._wrapper.merge_and_unload()
        self._wrapper = None
        self._finished += 1
        after = _copy(model)
        # The base stands for the domains to come: it has no weight once one is finished.
        self._mean = {name: mean.lerp(after[name], 1 / self._finished) for name, mean in self._mean.items()}
        _write(model, self._mean)

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        self._base = _copy(base)
        model = AdamW.restore(self, base, folders)  # type: ignore[arg-type]  # an ordinary model was saved
        self._mean, self._finished = _copy(model), len(folders)
        return model


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in model.named_parameters()}


@torch.no_grad()
def _write(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])
