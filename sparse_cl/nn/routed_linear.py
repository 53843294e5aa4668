"""A linear layer with a side branch that each token reaches through its own most active neurons alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_cl import storage
from sparse_cl.layout import state_dtype

ROUTINGS = ("top", "random", "none")
SIDES = ("inputs", "outputs")


class RoutedLinear(nn.Linear):
    """y = W h + b + ΔW (h ⊙ m(h)), where m(h) picks the k inputs of a token that are largest in magnitude.

    On the layer out of an MLP's neurons, a column of ΔW learns from, and acts on, only tokens that activate its neuron.
    ΔW depends on the token, so it cannot be merged into W; `save_routed` and `load_routed` keep it beside the model.
    The branch costs k (not in_features) multiplications a token and output, forward and backward. :func:`route` makes
    layers of a model into these, in place.

    With `side` "outputs", for the layers into neurons: y = z + m(z) ⊙ ΔW x with z = W x + b, where m(z) picks the k
    largest outputs, or those that a leader picks: an up projection follows its gate. Rows of ΔW then stand for neurons.
    This costs a dense product.

    Attributes:
        columns: a vector for each neuron, ΔWᵀ, (in_features, out_features), or of the outputs ΔW, (out_features,
            in_features); float32 or the weight's float64, at first 0; or with a rank its factor (neurons, rank).
        mix: the other factor, (out_features, rank), or of the outputs (in_features, rank), at first 0; None without a
            rank.
        open: (k',) int64, ascending: the neurons that a token chooses among.
        k: how many it chooses, of the open ones; all of these if there are fewer.
        routing: "top"; or, to compare with, "random": any k, drawn anew each time; "none": all that are open.
        side: which side the neurons are, "inputs" or "outputs".
        leader: the layer whose choice this one takes, which has to run before it; None: it chooses itself.
    """

    columns: nn.Parameter
    mix: nn.Parameter | None
    open: Tensor
    k: int
    routing: str
    side: str
    _leader: tuple[RoutedLinear, ...]
    _choice: Tensor

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        inputs = input.reshape(-1, input.shape[-1]).to(self.columns.dtype)
        if self.side == "inputs":
            branch = self.branch(inputs)
        else:
            branch = self._branch_of_outputs(inputs, output.reshape(-1, output.shape[-1]))
        return output + branch.view(output.shape).to(output.dtype)

    @property
    def leader(self) -> RoutedLinear | None:
        return self._leader[0] if self._leader else None

    def chosen(self, neurons: Tensor) -> Tensor:
        """Which neurons each token's branch runs through: (tokens, k) int64, of (tokens, neurons) inputs or outputs."""
        k = min(self.k, len(self.open))
        seen = neurons.detach().index_select(1, self.open)
        # What goes into an activation function opens a neuron by its value; what comes out of one, by its magnitude.
        score = seen.abs() if self.side == "inputs" else seen
        if self.routing == "random":
            score = torch.rand_like(seen)
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

    def _branch_of_outputs(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            product = (inputs if self.mix is None else inputs @ self.mix) @ self.columns.mT
            if self.routing == "none":
                index = self.open.expand(len(product), -1)
            else:
                index = self.chosen(outputs) if self.leader is None else self._followed(self.leader)
            self._choice = index
            return torch.zeros_like(product).scatter(1, index, product.gather(1, index))

    def _followed(self, leader: RoutedLinear) -> Tensor:
        """The choice that the leader has made since this layer took one."""
        index = getattr(leader, "_choice", None)
        if index is None or index is getattr(self, "_choice", None):
            raise RuntimeError(
                "follow: a layer ran before its leader, whose choice would be of other tokens; make the one that runs "
                "first the leader, or route both without follow"
            )
        return index

    def extra_repr(self) -> str:
        of = f"k={self.k} of {len(self.open)} {self.side}"
        return f"{super().extra_repr()}, {of}, routing={self.routing!r}"

    # A linear layer becomes one of these, and back, in place, so references to the module stay valid.

    def _begin(self, k: int, rank: int | None, routing: str, side: str, open: Tensor | None) -> None:
        device, dtype = self.weight.device, state_dtype(self.weight.dtype)
        self.k, self.routing, self.side, self._leader = k, routing, side, ()
        neurons, others = _sizes(self, side)
        kept = torch.arange(neurons) if open is None else open
        self.register_buffer("open", kept.to(device))
        columns = torch.zeros(neurons, others if rank is None else rank, dtype=dtype, device=device)
        if rank is not None:
            columns.normal_(std=1 / math.sqrt(k))
        self.columns = nn.Parameter(columns)
        mix = None if rank is None else nn.Parameter(torch.zeros(others, rank, dtype=dtype, device=device))
        self.register_parameter("mix", mix)

    def _end(self) -> None:
        del self.columns, self.mix, self.open, self.k, self.routing, self.side, self._leader
        self.__dict__.pop("_choice", None)
        self.__class__ = nn.Linear  # type: ignore[assignment]  # the way back of route()


def route(
    model: nn.Module,
    layers: Mapping[str, Tensor | None],
    k: int,
    *,
    rank: int | None = None,
    routing: str = "top",
    side: str = "inputs",
    follow: Mapping[str, str] | None = None,
) -> None:
    """Gives ``nn.Linear`` layers of a model a routed branch, in place; what they compute does not change by that.

    Args:
        layers: by name of the module the neurons that are open, (k',) distinct int64; None: all.
        k: neurons that a token's branch runs through, at least 1.
        rank: of ΔW; None: any. Low rank shares a factor among all neurons.
        routing, side: as of :class:`RoutedLinear`.
        follow: with side "outputs", name of a layer → that of its leader, which runs before it.

    Raises:
        TypeError, ValueError: no such layer, one that is no ``nn.Linear`` or routed already, neurons that it does not
            have, another routing or side, a k or rank below 1 or above the neurons; a leader that is not routed by its
            outputs, or of another width. The model stays as it was.
    """
    for argument, given, known in (("routing", routing, ROUTINGS), ("side", side, SIDES)):
        if given not in known:
            raise ValueError(f"{argument}: expected {', '.join(map(repr, known))}, got {given!r}")
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
        _refuse_replaced("layers", name, layer)
        width = _sizes(layer, side)[0]
        if not isinstance(k, int) or not 1 <= k <= width:
            raise ValueError(f"k: expected an integer from 1 to {width}, the {side} of {name!r}, got {k}")
        if rank is not None and not 1 <= rank <= width:
            raise ValueError(f"rank: expected None or 1 to {width}, the {side} of {name!r}, got {rank}")
        found[layer] = None if open is None else _checked(open, width, name, side)
    leaders = {name: _leader(model, name, leader, layers, side) for name, leader in (follow or {}).items()}
    for layer, open in found.items():
        layer.__class__ = RoutedLinear
        assert isinstance(layer, RoutedLinear)
        layer._begin(k, rank, routing, side, open)
    for name, leader in leaders.items():
        _follow(model, name, leader)


def _refuse_replaced(argument: str, name: str, layer: nn.Module) -> None:
    if "forward" in layer.__dict__:
        raise TypeError(
            f"{argument}: {name!r}: the forward of this layer was replaced on the object, as by accelerate's hooks, "
            "which would bypass the branch; route before hooks are added, or remove them"
        )


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
    names = {layer: name for name, layer in layers.items()}
    for name, layer in layers.items():
        tensors |= {f"{name}:columns": layer.columns, f"{name}:open": layer.open}
        if layer.mix is not None:
            tensors[f"{name}:mix"] = layer.mix
        facts[name] = {
            "k": layer.k,
            "routing": layer.routing,
            "rank": None if layer.mix is None else layer.mix.shape[1],
            "side": layer.side,
            "leader": None if layer.leader is None else names[layer.leader],
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
        if not isinstance(layer, nn.Linear) or type(layer) not in (nn.Linear, RoutedLinear):
            raise TypeError(f"{path}: {name!r} is a {type(layer).__name__}, expected an nn.Linear, as it was")
        _refuse_replaced(str(path), name, layer)
        rank, (neurons, others) = fact["rank"], _sizes(layer, fact["side"])
        shapes = {"columns": (neurons, others if rank is None else rank)}
        if rank is not None:
            shapes["mix"] = (others, rank)
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
        options = {option: fact[option] for option in ("rank", "routing", "side")}
        route(model, {name: tensors[f"{name}:open"]}, fact["k"], **options)
        layer = model.get_submodule(name)
        assert isinstance(layer, RoutedLinear)
        with torch.no_grad():
            layer.columns.copy_(tensors[f"{name}:columns"])
            if layer.mix is not None:
                layer.mix.copy_(tensors[f"{name}:mix"])
    # Only now: who is followed may follow another.
    for name, fact in made.items():
        if fact["leader"] is not None:
            _follow(model, name, _leader(model, name, fact["leader"], made, fact["side"]))


def _sizes(layer: nn.Linear, side: str) -> tuple[int, int]:
    """How many neurons there are, and how many features on the other side."""
    sizes = layer.in_features, layer.out_features
    return sizes if side == "inputs" else sizes[::-1]


def _follow(model: nn.Module, name: str, leader: nn.Module) -> None:
    layer = model.get_submodule(name)
    assert isinstance(layer, RoutedLinear) and isinstance(leader, RoutedLinear)
    # In a tuple: a module that is an attribute would be a child.
    layer._leader = (leader,)


def _leader(model: nn.Module, name: str, leader: str, layers: Mapping[str, Any], side: str) -> nn.Module:
    if side != "outputs" or name not in layers:
        raise ValueError(f"follow: expected layers that are routed here by their outputs, got {name!r}, side={side!r}")
    found = dict(model.named_modules()).get(leader)
    routed = leader in layers or (isinstance(found, RoutedLinear) and found.side == "outputs")
    if leader == name or not routed or not isinstance(found, nn.Linear):
        raise ValueError(f"follow: {name!r} is to follow {leader!r}, which is not routed by its outputs")
    if found.out_features != (own := model.get_submodule(name).out_features):
        raise ValueError(f"follow: {name!r} has {own} outputs, but its leader {leader!r} has {found.out_features}")
    return found


def _checked(open: Tensor, width: int, name: str, side: str) -> Tensor:
    kept = open.to("cpu", torch.int64).unique()
    if not len(kept) or len(kept) != open.numel() or kept[0] < 0 or kept[-1] >= width:
        raise ValueError(f"layers: {name!r} has {side} 0 to {width - 1}; expected some of these, each once")
    return kept
