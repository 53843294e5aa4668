"""Selective write: neurons that earlier domains use more take less of each update; hubs take none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl import storage
from sparse_cl.masks import ColumnMask, RowMask
from sparse_cl.models.parts import find_mlps
from sparse_cl.optim import SparseMaskedAdamW
from sparse_cl.probes.activation import ActivationProbe
from sparse_cl.probes.capacity import neurons_holding

from .base import Batch, Method, check_first
from .frozen import Frozen
from .neuron_account import NeuronAccount
from .neurons import masks_of
from .options import check_above_zero, check_at_least
from .waking import Waking

_FILE = "usage.safetensors"


def gains_of(usage: Tensor, closed: float, sharpness: float) -> Tensor:
    """The gain of each neuron of a layer: (1 + usage)^-sharpness, and 0 for the hubs.

    Args:
        usage: (neurons,), E|h_j| / mean_k E|h_k| (Sokar et al. 2023): 0 for a neuron that is never active, 1 for the
            average one.
        closed: share of the neurons that are hubs, those used most; rounded.
        sharpness: 0: all open neurons take the whole update.

    Returns:
        (neurons,) float32 in [0, 1], falling with usage.
    """
    # However sharp, no gain but a hub's is rounded to 0.
    gain = (1 + usage.double()).pow(-sharpness).float().clamp(min=torch.finfo(torch.float32).tiny)
    return gain.index_fill(0, usage.topk(round(closed * len(usage))).indices, 0)


class SelectiveWrite(Method):
    """AdamW that scales the step of each neuron down by how much earlier domains use it.

    A neuron's usage is the mean of its Sokar score (`gains_of`) over the domains learned so far and the text given to
    `protect`, each measured when it was learned. Gains act on the optimizer's step, weight decay included, after the
    division by the second moment: a gain on the gradient would be divided out again. Neurons are the MLPs' neurons;
    parameters of no neuron share the gain `rest`. Until there is anything to protect, all is trained as by AdamW.

    The account (`NeuronAccount`) counts as used the neurons that hold 90 % of a learned domain's mean |activation|
    (`capacity.neurons_holding`).

    With `wake` the neurons that all earlier texts use least are drawn anew before a domain begins (`Waking`, which says
    by how much the function changes; in `record`), and count as unused from then on. The optimizer is made after that
    and has no moments of them.

    Args:
        closed: share of the neurons that are hubs, in [0, 1).
        sharpness: exponent, at least 0.
        rest: gain of attention, embeddings, norms, head, in [0, 1]; 0: they are frozen.
        wake: share of the neurons that are woken, in [0, 1 - closed]; 0: none.
        tau: only neurons of at most this score are woken, 0.1 for those that Sokar et al. call dormant; None: all.
        boost: factor on the gain of woken neurons, which may make it more than 1.
        renew: False: woken neurons keep their weights, and have the factor alone.
    """

    name = "selective-write"
    default_lr = 2e-3
    protects = True
    options = ("closed", "sharpness", "rest", "wake", "tau", "boost", "renew")

    def __init__(
        self,
        closed: float = 0.3,
        sharpness: float = 3.0,
        rest: float = 0.1,
        wake: float = 0.0,
        tau: float | None = None,
        boost: float = 1.0,
        renew: bool = True,
    ) -> None:
        if not 0 <= closed < 1:
            raise ValueError(
                f"closed: expected a share of the neurons in [0, 1), got {closed}"
                + (", which leaves none to train" if closed >= 1 else "")
            )
        if not 0 <= rest <= 1:
            raise ValueError(f"rest: expected a gain in [0, 1], got {rest}")
        if wake + closed > 1:
            raise ValueError(f"wake: {wake} of the neurons and closed {closed} are more than all; give smaller shares")
        self.closed, self.sharpness, self.rest = closed, check_at_least("sharpness", sharpness, 0), rest
        self.wake, self.tau, self.boost, self.renew = wake, tau, check_above_zero("boost", boost), renew
        self._waking = Waking(wake, tau)
        self.masks: dict[str, RowMask | ColumnMask] = {}
        self.account = NeuronAccount()
        self._scores: dict[str, Tensor] = {}
        self._texts = 0
        self._frozen = Frozen()

    def check(self, model: nn.Module) -> None:
        self.account.check(model, self.name)
        for mlp in find_mlps(model):
            if round(self.closed * mlp.neurons) >= mlp.neurons:
                raise ValueError(
                    f"closed: {self.closed} of the {mlp.neurons} neurons of {mlp.name} are all of them, which leaves "
                    "none to train; give a smaller share"
                )

    def protect(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        check_first(self.name, not self._texts)
        self.account.used = self._observe(model, batches)

    @property
    def usage(self) -> dict[str, Tensor]:
        """MLP → (neurons,) float64, on the CPU; empty before anything was learned or protected."""
        return {layer: total / self._texts for layer, total in self._scores.items()}

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        self.check(model)
        usage = self.usage
        gains = {layer: gains_of(used, self.closed, self.sharpness) for layer, used in usage.items()}
        everything = {mlp.name: torch.ones(mlp.neurons) for mlp in find_mlps(model)}
        if gains and self.wake:
            self._wake(model, gains)
        self.account.begin(self.name, model, batches, {n: g.clamp(max=1) for n, g in gains.items()} or everything)
        for layer, woken in self._waking.layers.items():
            self.account.layers[layer] |= woken
        self.masks = masks_of(model, gains) if gains else {}
        frozen = bool(gains) and self.rest == 0
        self._frozen.freeze(p for name, p in model.named_parameters() if frozen and name not in self.masks)
        return model

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        masks = {name: self.masks[name] for name, _ in trained if name in self.masks}
        neurons = [(name, p) for name, p in trained if name in masks]
        rest = [(name, p) for name, p in trained if name not in masks]
        groups = ({"params": neurons, "lr": lr}, {"params": rest, "lr": lr * self.rest if self.masks else lr})
        return SparseMaskedAdamW([g for g in groups if g["params"]], lr=lr, masks=masks)

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self._frozen.thaw()
        self.account.end(self._observe(model, batches))

    def record(self) -> dict[str, Any]:
        return {"layers": self.account.layers}

    def save(self, folder: Path) -> None:
        self.account.save(folder)
        storage.write(folder / _FILE, "usage", self._scores, texts=self._texts)
        if self.wake:
            self._waking.save(folder)

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        self.account.load(folders[-1])
        self._scores, facts = storage.read(folders[-1] / _FILE, "usage", "the method's save", "texts")
        self._texts = facts["texts"]
        if self.wake:
            self._waking.load(folders[-1])
        return super().restore(base, folders)

    def _wake(self, model: nn.Module, gains: dict[str, Tensor]) -> None:
        """Wake neurons, and raise their gains in place."""
        chosen = self._waking.choose(model, {layer: gain == 0 for layer, gain in gains.items()})
        if self.renew:
            self._waking.renew(model, chosen, fold=self.rest > 0)
        for layer, woken in chosen.items():
            if self.renew:
                self._scores[layer][woken] = 0
                gains[layer][woken] = 1
            gains[layer][woken] *= self.boost

    def _observe(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Count one more text; MLP → (neurons,) bool, the neurons that it uses."""
        if self.wake:
            means = self._waking.observe(model, batches)
        else:
            means = ActivationProbe(model, tokens="all").run(batches).mean()
        for layer, mean in means.items():
            score = mean / mean.mean() if mean.any() else mean
            self._scores[layer] = self._scores.get(layer, 0) + score
        self._texts += 1
        return {layer: neurons_holding(mean) for layer, mean in means.items()}
