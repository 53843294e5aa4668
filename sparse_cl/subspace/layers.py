"""Which weights a memory tracks, and what it knows of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl.layout import is_split, state_dtype, whole

from .moments import Moment, row_blocks
from .subspace import Subspace, energy_of, trusted
from .tables import Table

_DISTRIBUTED = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@dataclass
class Layer:
    """One tracked weight: what is used of its input space, and what was observed since the last consolidation.

    Attributes:
        shape: (m, n), outputs and inputs.
        param: None while the memory is bound to no model.
        modules: linear layers that have this weight; only these can be watched.
        places: where in the model they stand; several where a weight or a module is shared.
        transposed: the weight is (n, m), as that of transformers' Conv1D.
        weight: Σ of the weights of its domains.
        source: the name of a layer that reads the same inputs, so that its moment counts here too.
    """

    name: str
    shape: tuple[int, int]
    param: Tensor | None = None
    modules: list[nn.Module] = field(default_factory=list)
    places: int = 0
    subspace: Subspace | None = None
    moment: Moment | None = None
    transposed: bool = False
    weight: float = 0.0
    source: str | None = None

    @property
    def width(self) -> int:
        return self.shape[1]

    @property
    def rank(self) -> int:
        return 0 if self.subspace is None else self.subspace.rank

    @property
    def rank_by_use(self) -> int:
        """Σ u_j / (1 + u_j) over its directions, rounded."""
        usage = None if self.subspace is None else self.subspace.usage.double()
        return 0 if usage is None else round(float((usage / (1 + usage)).sum()))

    def observed(self) -> Any:
        """The moment of a layer that was observed."""
        assert self.moment is not None, f"{self.name} was not observed"
        return self.moment

    def used(self) -> Subspace | None:
        """The used subspace, moved to where the parameter is now; None while there is none."""
        if self.subspace is not None and self.param is not None:
            self.subspace = self.subspace.to(*self.place())
        return self.subspace

    def faded(self, fade: float) -> Subspace | None:
        """The used subspace with all its energies times `fade`."""
        found = self.used()
        if found is None or fade == 1:
            return found
        return trusted(found.basis, found.values * fade, found.outside * fade, found.mean)

    def rows(self, matrix: Tensor) -> Tensor:
        """A matrix of the weight's shape, or one of such rows, as (…, n)."""
        return matrix.mT if self.transposed else matrix

    def share_inside(self, matrix: Tensor, by_use: bool = False) -> float:
        """‖R U Uᵀ‖²_F / ‖R‖²_F of a matrix's rows R (..., n), summed in float64; 0 of zeros and without a subspace.

        Args:
            by_use: direction j counts by u_j / (1 + u_j), u its usage, in place of 1.
        """
        subspace = self.used()
        if subspace is None or subspace.rank == 0:
            return 0.0
        rows = self.rows(whole(matrix)).reshape(-1, self.width)
        wide = state_dtype(rows.dtype)
        subspace = subspace.to(rows.device, wide)
        total = inside = 0.0
        usage = subspace.usage.double()
        parts = usage / (1 + usage) if by_use else torch.ones_like(usage)
        for block in row_blocks(rows, wide):
            total += float(energy_of(block))
            inside += float(subspace.energies(block) @ parts)
        return min(1.0, inside / total) if total else 0.0

    def place(self) -> tuple[torch.device, torch.dtype]:
        """Where and in what its subspace and moment are kept: float64 for float64 weights, else float32."""
        if self.param is None:
            return torch.device("cpu"), torch.float32
        return self.param.device, state_dtype(self.param.dtype)


def find_layers(
    source: nn.Module | Iterable[tuple[str, Tensor]], frozen: bool = False
) -> tuple[dict[str, Layer], dict[str, Table]]:
    """Tracked layers by name, and tables of embeddings by name.

    Of a model: the weights of its ``nn.Linear`` and Conv1D layers, those that an embedding shares too, which are in
    both. Of named parameters: those of two dimensions.

    Args:
        frozen: whether what is frozen of a model that PEFT wrapped is among them too.

    Raises:
        ValueError: there is none.
        TypeError: neither a module nor pairs of a name and a tensor.
    """
    if isinstance(source, nn.Module):
        # The base of an adapter is never trained; it may be quantized, and observing it would take its room.
        return _layers_of_module(source, trained=_has_adapters(source) and not frozen)
    if isinstance(source, Mapping):
        source = source.items()
    layers: dict[str, Layer] = {}
    for pair in source if isinstance(source, Iterable) else [source]:
        kinds = [type(x) for x in pair] if isinstance(pair, tuple) else [type(pair)]
        if len(kinds) != 2 or not (issubclass(kinds[0], str) and issubclass(kinds[1], Tensor)):
            raise TypeError(
                "model_or_named_params: expected a module or (name, parameter) pairs, got "
                f"{', '.join(kind.__name__ for kind in kinds)}; pass model or model.named_parameters()"
            )
        name, param = pair
        if param.dim() == 2 and param.is_floating_point():
            _refuse_split(name, param)
            layers[name] = Layer(name, tuple(param.shape), param)
    if not layers:
        raise ValueError("model_or_named_params: no parameter has two dimensions, so there is no layer to track")
    return layers, {}


def follow(layers: Mapping[str, Layer], tables: Mapping[str, Table]) -> dict[str, Any]:
    """Ties both to the parameters that their modules have now, in whose place ``fully_shard`` puts others.

    Returns:
        The weights of layers by name.
    """
    tied: list[Any] = [*layers.values(), *tables.values()]
    for each in tied:
        if each.modules:
            each.param = each.modules[0].weight
    return {name: layer.param for name, layer in layers.items() if layer.param is not None}


def plain_name(name: str) -> str:
    """A parameter's name in the model itself, not in parts of it that are compiled or checkpointed."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _inside(model: nn.Module) -> nn.Module:
    """The model that others wrap to compile or distribute it."""
    while True:
        held = "_orig_mod" if hasattr(model, "_orig_mod") else "module"
        inner = getattr(model, held, None)
        if not isinstance(inner, nn.Module) or (held == "module" and type(model).__name__ not in _DISTRIBUTED):
            return model
        model = inner


def _has_adapters(model: nn.Module) -> bool:
    return any(hasattr(module, "get_base_layer") for module in model.modules())


def _layers_of_module(model: nn.Module, trained: bool) -> tuple[dict[str, Layer], dict[str, Table]]:
    model = _inside(model)
    names = {id(param): plain_name(name) for name, param in model.named_parameters()}
    tables: dict[str, Table] = {}
    layers: dict[str, Layer] = {}
    by_param: dict[int, Layer] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        if trained and not getattr(getattr(module, "weight", None), "requires_grad", False):
            continue
        if isinstance(module, nn.Embedding) and id(module.weight) in names:
            name = names[id(module.weight)]
            table = tables.setdefault(name, Table(name, len(module.weight), module.weight))
            if all(module is not other for other in table.modules):
                table.modules.append(module)
        transposed = is_transposed(module)
        if not isinstance(module, nn.Linear) and not transposed:
            continue
        own: Any = module
        if id(own.weight) not in names:
            continue  # computed of other parameters at each pass, as by weight_norm
        layer = by_param.get(id(own.weight))
        if layer is None:
            name = names[id(own.weight)]
            _refuse_split(name, own.weight, transposed)
            if own.weight.is_complex():
                raise TypeError(
                    f"model_or_named_params: {name} is {own.weight.dtype}; expected real weights, which multiply real "
                    "inputs: give the real and the imaginary part a layer each"
                )
            # A quantized weight has another shape than the matrix that it stands for.
            shape = tuple(own.weight.shape[::-1]) if transposed else (own.out_features, own.in_features)
            layer = Layer(name, shape, own.weight, transposed=transposed)
            layers[name] = by_param[id(own.weight)] = layer
        layer.places += 1
        if all(module is not other for other in layer.modules):
            layer.modules.append(module)
    if not layers:
        kinds = sorted({type(m).__name__ for m in model.modules() if any(True for _ in m.parameters(recurse=False))})
        raise ValueError(
            f"model_or_named_params: {type(model).__name__} has no torch.nn.Linear; its layers "
            f"with parameters are {', '.join(kinds) or 'none'}. Pass (name, weight) pairs of matrices whose rows are "
            "to be protected"
        )
    return layers, tables


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D, whose weight is (inputs, outputs); known by its name."""
    # FSDP makes a subclass of a layer that it shards by itself.
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__) and hasattr(module, "nf")


def _refuse_split(name: str, weight: Tensor, transposed: bool = False) -> None:
    if is_split(weight, 0 if transposed else 1):
        raise ValueError(
            f"model_or_named_params: {name} is split over processes along its inputs, so that none of them knows how "
            "far it has moved along a direction; expected it whole, or split along its outputs, as fully_shard and "
            "ColwiseParallel leave a Linear"
        )
