"""Memories in safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import Tensor

from sparse_cl import storage

from .layers import Layer
from .subspace import Subspace

_KIND, _WRITER = "memory", "SubspaceMemory.save"
_SETTINGS = ("max_rank", "energy", "source", "oversample", "seed", "domains", "embeddings")


def save(settings: Mapping[str, Any], layers: Mapping[str, Layer], path: str | PathLike) -> None:
    """Writes a memory: a matrix a layer, what was observed, and in the header all else."""
    tensors, index = {}, {}
    for name, layer in layers.items():
        index[name] = {"shape": list(layer.shape), "complement": None}
        if layer.subspace is not None:
            index[name]["complement"] = layer.subspace.complement
            tensors[f"{name}:basis"] = layer.subspace.matrix
        if layer.moment is not None:
            tensors |= {f"{name}:{key}": tensor for key, tensor in layer.moment.tensors().items()}
    storage.write(path, _KIND, tensors, settings={key: settings[key] for key in _SETTINGS}, layers=index)


def load(path: str | PathLike) -> tuple[dict[str, Any], list[tuple[Layer, dict[str, Tensor]]]]:
    """Settings, and each layer with the tensors of its moment.

    Raises:
        ValueError: the file is truncated, or holds something else.
        FileNotFoundError: there is no such file.
    """
    tensors, facts = storage.read(path, _KIND, _WRITER, "settings", "layers")
    try:
        settings = {key: facts["settings"][key] for key in _SETTINGS}
        return settings, [_layer(name, entry, tensors) for name, entry in facts["layers"].items()]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: the memory is damaged ({error}); write it again with {_WRITER}") from error


def _layer(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Layer, dict[str, Tensor]]:
    layer = Layer(name, tuple(entry["shape"]))
    if entry["complement"] is not None:
        layer.subspace = Subspace(tensors[f"{name}:basis"], entry["complement"])
        if layer.subspace.width != layer.width:
            raise ValueError(f"the basis of {name!r} has width {layer.subspace.width}, not {layer.width}")
    keys = ("moment", "sketch", "energies")
    return layer, {key: tensors[f"{name}:{key}"] for key in keys if f"{name}:{key}" in tensors}
