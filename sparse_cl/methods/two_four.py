"""Dense to 2:4: half of each layer's weights hold what was learned first, the other half learns on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparse_cl.masks import TwoFourMask, load_masks, save_masks
from sparse_cl.models.losses import mean_loss
from sparse_cl.models.parts import refuse_shared
from sparse_cl.optim import SparseMaskedAdamW
from sparse_cl.probes.two_four import SCORES, only_two_four, two_four_layers, two_four_masks

from .base import Batch, Method, check_first
from .frozen import Frozen
from .surviving import surviving_shares

_FILE, _SHARING = "locked.safetensors", "free_track.json"
_BATCHES = 4
"""Batches of which losses are measured."""


class TwoFour(Method):
    """Two of each four weights are locked once something is learned; later domains train the other two.

    The first domain trains everything. Then, of each four weights along the input of the blocks' linear layers, the two
    that matter most to it become the locked track and stay bit-identical. Later domains train the free track;
    everything else (embeddings, norms, biases, head) is frozen. With a text to protect, its two are locked before the
    first domain, which then trains the free track as well.

    This keeps the model with its free track at zero (`sparse_cl.probes.two_four.only_two_four`): it computes what it
    computed when it was locked, whatever is learned later, at the cost of the conversion that `record` reports. The
    dense model is not kept, since the free track writes into the same outputs. Nor can more be locked: domains after
    the first one on the free track overwrite each other there, and a warning says so.

    `record`: `layers`, with weights as their width; `conversion`, nats per token on the domain's first batches "before"
    it is learned and "after", with all weights (`dense`) and without the free track (`locked`). Before anything is
    locked, `locked` is what the domain's own two of four would give.

    Args:
        score: what matters: "wanda", magnitude × input norm, or "fisher", magnitude² × Fisher diagonal.
    """

    name = "two-four"
    protects = True
    options = ("score",)
    default_lr = 2e-3

    def __init__(self, score: str = "wanda") -> None:
        if score not in SCORES:
            raise ValueError(f"score: expected {' or '.join(map(repr, SCORES))}, got {score!r}")
        self.score = score
        self.locked: Mapping[str, TwoFourMask] = {}
        self.sharing = 0
        self._before: dict[str, Tensor] = {}
        self._record: dict[str, Any] = {}
        self._frozen = Frozen()

    def settings(self) -> dict[str, Any]:
        return {"score": self.score}

    def check(self, model: nn.Module) -> None:
        super().check(model)
        refuse_shared(model)
        two_four_layers(model)

    def protect(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        check_first(self.name, not self.locked)
        self.locked = two_four_masks(model, batches, self.score)

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        self.check(model)
        weights = two_four_layers(model)
        masks = self.locked or two_four_masks(model, batches, self.score)
        self._record = {"conversion": {"before": _losses(model, masks, batches)}}
        self._record["layers"] = {name: {"surviving": 1.0, "leak": None} for name in weights}
        if not self.locked:
            return model
        if self.sharing:
            warnings.warn(
                f"{self.name}: the free track has been written by {self.sharing} domain"
                f"{'s' if self.sharing > 1 else ''} already, and nothing protects what they wrote there",
                stacklevel=2,
            )
        parameters = {name: module.weight for name, module in weights.items()}
        for name, share in surviving_shares(model, parameters, batches, self._share_locked).items():
            self._record["layers"][name]["surviving"] = share
        self._before = {name: module.weight.detach().to("cpu", copy=True) for name, module in weights.items()}
        self._frozen.freeze(p for name, p in model.named_parameters() if name not in self.locked)
        return model

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        masks = {name: ~self.locked[name] for name, _ in trained if name in self.locked}
        return SparseMaskedAdamW(trained, lr=lr, masks=masks)

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self._frozen.thaw()
        if self.locked:
            self.sharing += 1
            for name, before in self._before.items():
                change = model.get_parameter(name).detach().cpu() - before
                self._record["layers"][name]["leak"] = self._share_locked(name, change)
            self._before = {}
        else:
            self.locked = two_four_masks(model, batches, self.score)
        self._record["conversion"]["after"] = _losses(model, self.locked, batches)
        for name, layer in self._record["layers"].items():
            width, used = self.locked[name].shape.numel(), self.locked[name].numel
            layer |= {"width": width, "used": used, "free": width - used}

    def record(self) -> dict[str, Any]:
        return self._record

    def save(self, folder: Path) -> None:
        save_masks(self.locked, folder / _FILE)
        (folder / _SHARING).write_text(json.dumps({"sharing": self.sharing}))

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        model = super().restore(base, folders)
        masks = load_masks(folders[-1] / _FILE, next(model.parameters()).device)
        self.locked = cast("dict[str, TwoFourMask]", masks)  # as `save` wrote them
        self.sharing = json.loads((folders[-1] / _SHARING).read_text())["sharing"]
        return model

    def _share_locked(self, name: str, change: Tensor) -> float:
        """Share of the energy of a change that is in locked weights; 0 where nothing changed."""
        squares = change.double().square()
        total = float(squares.sum())
        return float(squares[self.locked[name].to(squares.device).to_dense()].sum()) / total if total else 0.0


def _losses(model: nn.Module, masks: Mapping[str, TwoFourMask], batches: Iterable[Batch]) -> dict[str, float]:
    first = list(islice(batches, _BATCHES))
    dense = mean_loss(model, first)
    with only_two_four(model, masks):
        return {"dense": dense, "locked": mean_loss(model, first)}
