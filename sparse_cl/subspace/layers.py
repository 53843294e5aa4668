"""Which weights a memory tracks, and what it knows of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .moments import ExactMoment, SketchedMoment, row_blocks
from .subspace import Subspace, energy_of

Moment = ExactMoment | SketchedMoment


@dataclass
class Layer:
    """One tracked weight (m, n): its used subspace, and what was observed since the last consolidation.

    Attributes:
        param: None while the memory is bound to no model.
        modules: linear layers that have this weight; only these can be watched.
    """

    name: str
    shape: tuple[int, int]
    param: Tensor | None = None
    modules: list[nn.Module] = field(default_factory=list)
    subspace: Subspace | None = None
    moment: Moment | None = None

    @property
    def width(self) -> int:
        return self.shape[1]

    @property
    def rank(self) -> int:
        return 0 if self.subspace is None else self.subspace.rank

    def used(self) -> Subspace | None:
        """The used subspace, moved to where the parameter is now; None while there is none."""
        if self.subspace is not None and self.param is not None:
            self.subspace = self.subspace.to(*self.place())
        return self.subspace

    def share_inside(self, rows: Tensor) -> float:
        """‖R U Uᵀ‖²_F / ‖R‖²_F of rows R (..., n), summed in float64; 0 of zeros and without a subspace."""
        subspace = self.used()
        if subspace is None or subspace.rank == 0:
            return 0.0
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        subspace = subspace.to(rows.device, wide)
        total = inside = 0.0
        for block in row_blocks(rows, wide):
            total += float(energy_of(block))
            inside += float(subspace.used_energy(block))
        return min(1.0, inside / total) if total else 0.0

    def place(self) -> tuple[torch.device, torch.dtype]:
        """Where and in what its subspace and moment are kept: float64 for float64 weights, else float32."""
        if self.param is None:
            return torch.device("cpu"), torch.float32
        wide = self.param.dtype == torch.float64
        return self.param.device, torch.float64 if wide else torch.float32


def find_layers(source: nn.Module | Iterable[tuple[str, Tensor]]) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """Tracked layers by name, and parameters of embeddings by name.

    Of a model: the weights of its ``nn.Linear`` layers, but not those that an embedding shares. Of named parameters:
    those of two dimensions.

    Raises:
        ValueError: there is none.
        TypeError: neither a module nor pairs of a name and a tensor.
    """
    if isinstance(source, nn.Module):
        return _layers_of_module(source)
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
            layers[name] = Layer(name, tuple(param.shape), param)
    if not layers:
        raise ValueError("model_or_named_params: no parameter has two dimensions, so there is no layer to track")
    return layers, {}


def _layers_of_module(model: nn.Module) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    embeddings = {
        f"{name}.{own}" if name else own: param
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        for own, param in module.named_parameters(recurse=False)
    }
    tied = set(map(id, embeddings.values()))
    layers: dict[str, Layer] = {}
    by_param: dict[int, Layer] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or id(module.weight) in tied:
            continue
        layer = by_param.get(id(module.weight))
        if layer is None:
            name = f"{name}.weight" if name else "weight"
            # A quantized weight has another shape than the matrix that it stands for.
            layer = Layer(name, (module.out_features, module.in_features), module.weight)
            layers[name] = by_param[id(module.weight)] = layer
        layer.modules.append(module)
    if not layers:
        kinds = sorted({type(m).__name__ for m in model.modules() if any(True for _ in m.parameters(recurse=False))})
        raise ValueError(
            f"model_or_named_params: {type(model).__name__} has no torch.nn.Linear whose weight is its own; its layers "
            f"with parameters are {', '.join(kinds) or 'none'}. Pass (name, weight) pairs of matrices whose rows are "
            "to be protected"
        )
    return layers, embeddings
