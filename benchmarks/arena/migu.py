"""MIGU: only the rows of a gradient whose outputs are large reach the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparse_cl.methods.adamw import AdamW
from sparse_cl.methods.base import Batch
from sparse_cl.methods.options import check_share
from sparse_cl.models.parts import is_transposed, linear_layers


class OutputMagnitudes:
    """Σ|y| of each output of linear layers, over the tokens of the forward passes since the last `reset`.

    Padding counts for nothing where the model is called with attention_mask=. Its hooks stay until `remove`.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.sums: dict[nn.Module, Tensor] = {}
        self._tokens: Tensor | None = None
        self._hooks: list[RemovableHandle] = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self._hooks += [layer.register_forward_hook(self._add) for layer in layers.values()]

    def _begin(self, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        mask = named.get("attention_mask")
        self._tokens = mask.flatten() if mask is not None and mask.dim() == 2 else None

    @torch.no_grad()
    def _add(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not layer.training:
            return
        rows = output.flatten(0, -2).abs()
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = rows.sum(0, dtype=wide) if self._tokens is None else (self._tokens.to(rows.dtype) @ rows).to(wide)
        self.sums[layer] = self.sums[layer].add_(total) if layer in self.sums else total

    def reset(self) -> None:
        self.sums.clear()

    def remove(self) -> None:
        self.reset()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class MIGUAdamW(torch.optim.AdamW):
    """AdamW whose gradients are first masked by output magnitudes.

    Rows of a layer's gradient (and entries of its bias's) are zero where the outputs since the last step were below
    the quantile of their layer. Masked entries still move: by momentum and by weight decay.

    Args:
        magnitudes: of the layers whose gradients are masked; it is reset by each step.
        quantile: in (0, 1); linearly interpolated.
    """

    def __init__(
        self, params: Any, lr: float, *, magnitudes: OutputMagnitudes, quantile: float, **options: Any
    ) -> None:
        super().__init__(params, lr=lr, **options)
        self.magnitudes, self.quantile = magnitudes, quantile

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zeroes the rows; a second call changes nothing."""
        sums = self.magnitudes.sums
        if dist.is_available() and dist.is_initialized():
            # Masks that differ between processes would let their weights drift apart.
            for total in sums.values():
                dist.all_reduce(total)
        for layer, total in sums.items():
            kept = total >= torch.quantile(total, self.quantile)
            if layer.weight.grad is not None:
                layer.weight.grad.mul_(kept if is_transposed(layer) else kept[:, None])
            if layer.bias is not None and layer.bias.grad is not None:
                layer.bias.grad.mul_(kept)
        self.magnitudes.reset()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Masks, then scales the gradients to a joint 2-norm of at most `max_norm`; returns the norm before."""
        self.mask_gradients()
        return nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], max_norm)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        self.mask_gradients()
        return super().step(closure)


class MIGU(AdamW):
    """From the second domain on, AdamW on gradients masked by output magnitude (Du et al. 2024, published form).

    Masked are the linear layers of all residual blocks, each step anew, by the outputs of that step's tokens. What is
    no such layer (embeddings, norms, the head) is trained as by AdamW.

    Args:
        quantile: rows whose outputs are below this quantile of their layer's get no gradient.
    """

    name = "migu"
    options = ("quantile",)

    def __init__(self, quantile: float = 0.7) -> None:
        self.quantile = check_share("quantile", quantile, one=False)
        self.domains = 0
        self._magnitudes: OutputMagnitudes | None = None

    def check(self, model: nn.Module) -> None:
        super().check(model)
        linear_layers(model)

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        if not self.domains:
            return super().make_optimizer(model, lr)
        self._stop_watching()  # of a domain that was left half learned
        self._magnitudes = OutputMagnitudes(model, linear_layers(model))
        return MIGUAdamW(model.parameters(), lr, magnitudes=self._magnitudes, quantile=self.quantile)

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self.domains += 1
        self._stop_watching()

    def _stop_watching(self) -> None:
        if self._magnitudes is not None:
            self._magnitudes.remove()
            self._magnitudes = None

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        self.domains = len(folders)
        return super().restore(base, folders)
