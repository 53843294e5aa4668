"""Routing by token: a side branch whose columns learn from, and act on, only the tokens that activate their neurons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl import storage
from sparse_cl.masks import RowMask
from sparse_cl.models.neuron_masks import neuron_count
from sparse_cl.models.parts import MLP, find_mlps, has_adapters, refuse_shared
from sparse_cl.nn import load_routed, route, routed_layers, save_routed
from sparse_cl.nn.routed_linear import ROUTINGS
from sparse_cl.optim import SparseMaskedAdamW
from sparse_cl.probes.result import plain
from sparse_cl.probes.routing import Choices, choices

from .base import Batch, Method
from .frozen import Frozen
from .neurons import most_active
from .options import check_at_least, check_share

_FILE, _CHOICES = "routed.safetensors", "choices.safetensors"


class Routed(Method):
    """One branch beside each layer out of an MLP's neurons, through all domains; the model itself is frozen.

    y = W h + ΔW (h ⊙ m(h)), m(h) the k largest |h_i| of a token (`sparse_cl.nn.RoutedLinear`): where two domains'
    tokens activate different neurons, neither learns into what the other runs through. It cannot be merged; the folder
    has the branch in a file of its own, which `sparse_cl.nn.load_routed` adds to the base model.

    `record`: `routing`, by layer: `k`, `open`, and the share of its k neurons that a token has in common with another
    of its domain (`itself`), with one of each earlier domain (`earlier`), and by chance.

    Args:
        share: k over the neurons of a layer, in (0, 1].
        open: share of a layer's neurons that a domain may train, those most active on it; all domains' open ones are
            run through.
        rank: of ΔW; 0: any. Low rank shares one factor among all neurons, so these isolate less.
        routing: "top"; or, to compare with, "random": any k, drawn anew each time; "none": all that are open. With
            "none" and `open` below 1 this is one mask a domain.
        layers: "out" of the neurons, or "all": those into them have a branch too, whose rows stand for neurons; a
            token's gate chooses the k that it opens most.
    """

    name = "routed"
    default_lr = 4e-3
    options = ("share", "open", "rank", "routing", "layers")

    def __init__(
        self, share: float = 0.1, open: float = 1.0, rank: int = 0, routing: str = "top", layers: str = "out"
    ) -> None:
        self.share, self.open = check_share("share", share), check_share("open", open)
        if routing not in ROUTINGS:
            raise ValueError(f"routing: expected {', '.join(map(repr, ROUTINGS))}, got {routing!r}")
        self.routing = routing
        self.rank = check_at_least("rank", rank, 0)
        if layers not in ("out", "all"):
            raise ValueError(f"layers: expected 'out' or 'all', got {layers!r}")
        self.layers = layers
        self._own: dict[str, Tensor] = {}
        self._choices: list[dict[str, Choices]] = []
        self._model: nn.Module | None = None
        self._record: dict[str, Any] = {}
        self._frozen = Frozen()

    def check(self, model: nn.Module) -> None:
        super().check(model)
        if has_adapters(model):
            raise ValueError(f"{self.name}: the model has an adapter of PEFT, beside which nothing is routed; merge it")
        refuse_shared(model)
        for mlp in find_mlps(model):
            if self._into(mlp) and mlp.layout.stacked:
                raise ValueError(f"{self.name}: layers: gate and up of {mlp.name} are one layer; take 'out'")
            for name, layer in {mlp.out_name: mlp.out, **self._into(mlp)}.items():
                if not isinstance(layer, nn.Linear):
                    raise ValueError(
                        f"{self.name}: {name} is a {type(layer).__name__}, expected a torch.nn.Linear; take a model of "
                        "these, or another method"
                    )

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        self.check(model)
        mlps, found = find_mlps(model), most_active(model, batches, self.open)
        self._own = {name: found[mlp.name].cpu() for mlp in mlps for name in (mlp.out_name, *self._into(mlp))}
        if layers := routed_layers(model):
            for name, layer in layers.items():
                layer.open = torch.cat([layer.open.cpu(), self._own[name]]).unique().to(layer.weight.device)
        else:
            k = neuron_count(self.share, min(mlp.neurons for mlp in mlps))
            options: dict[str, Any] = {"rank": self.rank or None, "routing": self.routing}
            route(model, {mlp.out_name: self._own[mlp.out_name] for mlp in mlps}, k, **options)
            follow: dict[str, str] = {}
            for mlp in mlps:
                first, *others = self._into(mlp) or [""]
                follow |= dict.fromkeys(others, first)
            if into := {name: self._own[name] for mlp in mlps for name in self._into(mlp)}:
                route(model, into, k, side="outputs", follow=follow, **options)
        self._model, branch = model, set(self._branch(model))
        self._frozen.freeze(parameter for name, parameter in model.named_parameters() if name not in branch)
        return model

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        trained = self._branch(model)
        masks = {
            f"{name}.columns": RowMask(self._own[name], layer.columns.shape)
            for name, layer in routed_layers(model).items()
        }
        # Decay would move the columns that no token of the domain runs through.
        return SparseMaskedAdamW(trained.items(), lr=lr, masks=masks, weight_decay=0.0)

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self._frozen.thaw()
        found = choices(model, batches)
        self._record = {
            "routing": {
                name: {
                    "k": one.k,
                    "open": one.open,
                    "itself": plain(one.overlap()),
                    "earlier": [one.overlap(other[name]) for other in self._choices],
                    "chance": one.chance,
                }
                for name, one in found.items()
            }
        }
        self._choices.append(found)

    def record(self) -> dict[str, Any]:
        return self._record

    def save(self, folder: Path) -> None:
        counts = {f"{i}:{name}": one.counts for i, found in enumerate(self._choices) for name, one in found.items()}
        facts = [{name: (one.tokens, one.k, one.open) for name, one in found.items()} for found in self._choices]
        storage.write(folder / _CHOICES, "choices", counts, domains=facts)
        assert self._model is not None
        save_routed(self._model, folder / _FILE)

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        counts, facts = storage.read(folders[-1] / _CHOICES, "choices", "the method's save", "domains")
        self._choices = [
            {name: Choices(counts[f"{i}:{name}"], *one) for name, one in found.items()}
            for i, found in enumerate(facts["domains"])
        ]
        load_routed(base, folders[-1] / _FILE)
        self._model = base
        return base

    def _into(self, mlp: MLP) -> dict[str, Any]:
        """The layers into the neurons that have a branch, the gate first."""
        return dict(mlp.into) if self.layers == "all" else {}

    def _branch(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The branch's parameters by name."""
        return {
            f"{path}.{name}": parameter
            for path, layer in routed_layers(model).items()
            for name, parameter in (("columns", layer.columns), ("mix", layer.mix))
            if parameter is not None
        }
