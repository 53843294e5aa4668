"""A linear layer with a side branch that each token reaches through its own most active inputs alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_cl import storage

ROUTINGS = ("top", "random", "none")


class RoutedLinear(nn.Linear):
    """y = W h + b + ΔW (h ⊙ m(h)), where m(h) picks the k inputs of a token that are largest in magnitude.

    On the layer out of an MLP's neurons, a column of ΔW learns from, and acts on, only tokens that activate its neuron.
    ΔW depends on the token, so it cannot be merged into W; `save_routed` and `load_routed` keep it beside the model.
    The branch costs k (not in_features) multiplications a token and output, forward and backward. :func:`route` makes
    layers of a model into these, in place.

    Attributes:
        columns: ΔWᵀ, (in_features, out_features), float32 or the weight's float64, at first 0; or with a rank its
            factor (in_features, rank).
        mix: the other factor, (out_features, rank), at first 0; None without a rank.
        open: (k',) int64, ascending: the inputs that a token chooses among.
        k: how many it chooses, of the open ones; all of these if there are fewer.
        routing: "top"; or, to compare with, "random": any k, drawn anew each time; "none": all that are open.
    """

    columns: nn.Parameter
    mix: nn.Parameter | None
    open: Tensor
    k: int
    routing: str

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        branch = self.branch(input.reshape(-1, input.shape[-1]).to(self.columns.dtype))
        return output + branch.view(output.shape).to(output.dtype)

    def chosen(self, inputs: Tensor) -> Tensor:
        """Which inputs each token's branch runs through: (tokens, k) int64, of (tokens, in_features) inputs."""
        k = min(self.k, len(self.open))
        seen = inputs.detach().index_select(1, self.open)
        score = torch.rand_like(seen) if self.routing == "random" else seen.abs()
        return self.open[score.topk(k, sorted=False).indices]

    def branch(self, inputs: Tensor) -> Tensor:
        """ΔW (h ⊙ m(h)) of (tokens, in_features) inputs in the branch's dtype: (tokens, out_features)."""
        with torch.autocast(inputs.device.type, enabled=False):
            if self.routing == "none":
                product = inputs.index_select(1, self.open) @ self.columns.index_select(0, self.open)
            else:
                index = self.chosen(inputs)
                values = inputs.gather(1, index)
                product = functional.embedding_bag(index, self.columns, mode="sum", per_sample_weights=values)
            return product if self.mix is None else product @ self.mix.mT

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k} of {len(self.open)}, routing={self.routing!r}"

    # A linear layer becomes one of these, and back, in place, so references to the module stay valid.

    def _begin(self, k: int, rank: int | None, routing: str, open: Tensor | None) -> None:
        device, dtype = self.weight.device, self.weight.dtype
        dtype = dtype if dtype == torch.float64 else torch.float32
        self.k, self.routing = k, routing
        kept = torch.arange(self.in_features) if open is None else open
        self.register_buffer("open", kept.to(device))
        width = self.out_features if rank is None else rank
        columns = torch.zeros(self.in_features, width, dtype=dtype, device=device)
        if rank is not None:
            columns.normal_(std=1 / math.sqrt(k))
        self.columns = nn.Parameter(columns)
        mix = None if rank is None else nn.Parameter(torch.zeros(self.out_features, rank, dtype=dtype, device=device))
        self.register_parameter("mix", mix)

    def _end(self) -> None:
        del self.columns, self.mix, self.open, self.k, self.routing
        self.__class__ = nn.Linear  # type: ignore[assignment]  # the way back of route()


def route(
    model: nn.Module,
    layers: Mapping[str, Tensor | None],
    k: int,
    *,
    rank: int | None = None,
    routing: str = "top",
) -> None:
    """Gives ``nn.Linear`` layers of a model a routed branch, in place; what they compute does not change by that.

    Args:
        layers: by name of the module the inputs that are open, (k',) distinct int64; None: all.
        k: inputs that a token's branch runs through, at least 1.
        rank: of ΔW; None: any. Low rank shares a factor among all columns.
        routing: as of :class:`RoutedLinear`.

    Raises:
        TypeError, ValueError: no such layer, one that is no ``nn.Linear`` or routed already, inputs that it does not
            have, another routing, a k or rank below 1 or above the inputs. The model stays as it was.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"routing: expected {', '.join(map(repr, ROUTINGS))}, got {routing!r}")
    if not layers:
        raise ValueError("layers: expected the name of a linear layer at least, got none")
    found = {}
    for name, open in layers.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"layers: the model has no module {name!r}") from None
        if type(layer) is not nn.Linear:
            again = "; call unroute(model) first" if isinstance(layer, RoutedLinear) else ""
            raise TypeError(f"layers: {name!r} is a {type(layer).__name__}, expected an nn.Linear{again}")
        width = layer.in_features
        if not isinstance(k, int) or not 1 <= k <= width:
            raise ValueError(f"k: expected an integer from 1 to {width}, the inputs of {name!r}, got {k}")
        if rank is not None and not 1 <= rank <= width:
            raise ValueError(f"rank: expected None or 1 to {width}, the inputs of {name!r}, got {rank}")
        found[layer] = None if open is None else _checked(open, width, name)
    for layer, open in found.items():
        layer.__class__ = RoutedLinear
        assert isinstance(layer, RoutedLinear)
        layer._begin(k, rank, routing, open)


def unroute(model: nn.Module) -> None:
    """Takes all routed branches away, and what they learned with them. Without any nothing happens."""
    for layer in routed_layers(model).values():
        layer._end()


def routed_layers(model: nn.Module) -> dict[str, RoutedLinear]:
    """The layers that have a routed branch, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedLinear)}


def save_routed(model: nn.Module, path: str | PathLike) -> None:
    """Writes the routed branches of a model, and nothing else of it, to a safetensors file.

    Raises:
        ValueError: the model has none.
    """
    layers = routed_layers(model)
    if not layers:
        raise ValueError("model: no layer has a routed branch; call route(model, ...) first")
    tensors: dict[str, Tensor] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        tensors |= {f"{name}:columns": layer.columns, f"{name}:open": layer.open}
        if layer.mix is not None:
            tensors[f"{name}:mix"] = layer.mix
        facts[name] = {
            "k": layer.k,
            "routing": layer.routing,
            "rank": None if layer.mix is None else layer.mix.shape[1],
        }
    storage.write(path, "routed", tensors, layers=facts)


def load_routed(model: nn.Module, path: str | PathLike) -> None:
    """Gives a model the branches that :func:`save_routed` wrote; those that it has are replaced.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: the file is no whole one of these, or of another model. The model stays as it was.
    """
    tensors, facts = storage.read(path, "routed", "save_routed", "layers")
    made: dict[str, dict[str, Any]] = {}
    for name, fact in facts["layers"].items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{path}: the model has no module {name!r}, which has a routed branch there") from None
        if type(layer) not in (nn.Linear, RoutedLinear):
            raise TypeError(f"{path}: {name!r} is a {type(layer).__name__}, expected an nn.Linear, as it was")
        rank = fact["rank"]
        shapes = {"columns": (layer.in_features, layer.out_features if rank is None else rank)}
        if rank is not None:
            shapes["mix"] = (layer.out_features, rank)
        for part, shape in shapes.items():
            tensor = tensors.get(f"{name}:{part}")
            if tensor is None or tuple(tensor.shape) != shape:
                given = "none" if tensor is None else tuple(tensor.shape)
                raise ValueError(
                    f"{path}: {name!r} wants {part} of shape {shape}, got {given}; the file is of another model"
                )
        made[name] = fact
    unroute(model)
    for name, fact in made.items():
        route(model, {name: tensors[f"{name}:open"]}, fact["k"], rank=fact["rank"], routing=fact["routing"])
        layer = model.get_submodule(name)
        assert isinstance(layer, RoutedLinear)
        with torch.no_grad():
            layer.columns.copy_(tensors[f"{name}:columns"])
            if layer.mix is not None:
                layer.mix.copy_(tensors[f"{name}:mix"])


def _checked(open: Tensor, width: int, name: str) -> Tensor:
    kept = open.to("cpu", torch.int64).unique()
    if not len(kept) or len(kept) != open.numel() or kept[0] < 0 or kept[-1] >= width:
        raise ValueError(f"layers: {name!r} has inputs 0 to {width - 1}; expected some of these, each once")
    return kept
