"""Dense to 2:4, by tracks: two of each four weights hold what was learned first, the others learn one domain each."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import islice
from operator import or_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl.masks import Mask, load_masks, save_masks
from sparse_cl.models.losses import mean_loss
from sparse_cl.models.parts import refuse_shared
from sparse_cl.optim import SparseMaskedAdamW
from sparse_cl.probes.two_four import SCORES, one_of_four_masks, only_two_four, two_four_layers, two_four_masks

from .base import Batch, Method, check_first
from .frozen import Frozen
from .neurons import trained
from .surviving import surviving_shares

TRACKS = 3
_FILE = "tracks.safetensors"
_BATCHES = 4
"""Batches of which losses are measured."""


class TwoFour(Method):
    """Of each four weights, two are locked for what is learned first, one for the next domain, one for the third.

    The first domain trains everything. Then, of each four weights along the input of the blocks' linear layers, the two
    that matter most to it become its track, and stay bit-identical. The second domain trains one of the other two, the
    one that matters more to it before it is learned; the third the last. Everything else (embeddings, norms, biases,
    head) is frozen from the second domain on. With a text to protect, its two are locked before the first domain, which
    then trains the second track. A further domain finds no track: a run does not train it, and it has the scores of the
    domain before; `before_domain` raises a ValueError.

    This keeps the model with its later tracks at zero (`sparse_cl.probes.two_four.only_two_four`): it computes what it
    computed when it was locked, whatever is learned later, at the cost of the conversion that `record` reports. The
    dense model is not kept, since later tracks write into the same outputs: with the weights of later tracks as they
    were, it computes what it computed after each domain.

    `record`: `layers`, with weights as their width; `conversion`, nats per token on the domain's first batches "before"
    it is learned and "after", with all weights (`dense`) and with the first track alone (`locked`). Before anything is
    locked, `locked` is what the domain's own two of four would give.

    Args:
        score: what matters: "wanda", magnitude × input norm, or "fisher", magnitude² × Fisher diagonal.

    Attributes:
        tracks: of each text and domain that was learned: weight name -> mask of what is locked for it.
    """

    name = "two-four"
    protects = True
    options = ("score",)
    default_lr = 2e-3

    def __init__(self, score: str = "wanda") -> None:
        if score not in SCORES:
            raise ValueError(f"score: expected {' or '.join(map(repr, SCORES))}, got {score!r}")
        self.score = score
        self.tracks: list[dict[str, Mask]] = []
        self._own: dict[str, Mask] = {}
        self._before: dict[str, Tensor] = {}
        self._record: dict[str, Any] = {}
        self._frozen = Frozen()

    @property
    def locked(self) -> dict[str, Mask]:
        """Weight name -> mask of all tracks that are taken; empty before anything is locked."""
        return (
            {name: reduce(or_, (track[name] for track in self.tracks)) for name in self.tracks[0]}
            if self.tracks
            else {}
        )

    def check(self, model: nn.Module) -> None:
        super().check(model)
        refuse_shared(model)
        two_four_layers(model)

    def steps(self, steps: int, number: int, domains: int, protected: bool = False) -> int:
        return steps if number + protected < TRACKS else 0

    def protect(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        check_first(self.name, not self.tracks)
        self.tracks = [{**two_four_masks(model, batches, self.score)}]

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        self.check(model)
        if len(self.tracks) == TRACKS:
            raise ValueError(
                f"{self.name}: no track is left; of each four weights, two were locked for what was learned first, and "
                "one each for the next two. Train the next domain from an earlier model, or by elastic"
            )
        weights = two_four_layers(model)
        first = self.tracks[0] if self.tracks else two_four_masks(model, batches, self.score)
        self._record = {"conversion": {"before": _losses(model, first, batches)}}
        self._record["layers"] = {name: {"surviving": 1.0, "leak": None} for name in weights}
        if not self.tracks:
            return model
        if len(self.tracks) == 1:
            self._own = {**one_of_four_masks(model, batches, self.tracks[0], self.score)}
        else:
            self._own = {name: ~mask for name, mask in self.locked.items()}
            warnings.warn(
                f"{self.name}: this domain takes the last track; a further one finds none, and is not trained",
                stacklevel=2,
            )
        parameters = {name: module.weight for name, module in weights.items()}
        for name, share in surviving_shares(model, parameters, batches, self._share_outside).items():
            self._record["layers"][name]["surviving"] = share
        self._before = {name: module.weight.detach().to("cpu", copy=True) for name, module in weights.items()}
        self._frozen.freeze(p for name, p in model.named_parameters() if name not in self._own)
        return model

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return SparseMaskedAdamW(**trained(model, self._own), lr=lr)

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self._frozen.thaw()
        for name, before in self._before.items():
            change = model.get_parameter(name).detach().cpu() - before
            self._record["layers"][name]["leak"] = self._share_outside(name, change)
        self.tracks.append(self._own or {**two_four_masks(model, batches, self.score)})
        self._own, self._before = {}, {}
        self._record["conversion"]["after"] = _losses(model, self.tracks[0], batches)
        locked = self.locked
        for name, layer in self._record["layers"].items():
            width, used = locked[name].shape.numel(), locked[name].numel
            layer |= {"width": width, "used": used, "free": width - used}

    def record(self) -> dict[str, Any]:
        return self._record

    def save(self, folder: Path) -> None:
        named = {f"{number}:{name}": mask for number, track in enumerate(self.tracks) for name, mask in track.items()}
        save_masks(named, folder / _FILE)

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        model = super().restore(base, folders)
        self.tracks = []
        for key, mask in load_masks(folders[-1] / _FILE, next(model.parameters()).device).items():
            number, _, name = key.partition(":")
            if int(number) == len(self.tracks):
                self.tracks.append({})
            self.tracks[int(number)][name] = mask
        return model

    def _share_outside(self, name: str, change: Tensor) -> float:
        """Share of the energy of a change that is outside the domain's own track; 0 where nothing changed."""
        squares = change.double().square()
        total = float(squares.sum())
        return float(squares[~self._own[name].to(squares.device).to_dense()].sum()) / total if total else 0.0


def _losses(model: nn.Module, masks: Mapping[str, Mask], batches: Iterable[Batch]) -> dict[str, float]:
    first = list(islice(batches, _BATCHES))
    dense = mean_loss(model, first)
    with only_two_four(model, masks):
        return {"dense": dense, "locked": mean_loss(model, first)}
