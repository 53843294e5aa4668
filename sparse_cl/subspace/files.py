"""Memories in safetensors files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from os import PathLike
from typing import Any

from torch import Tensor

from sparse_cl import storage

from .layers import Layer
from .settings import Settings
from .subspace import Subspace

_KIND, _WRITER = "memory", "SubspaceMemory.save"

#: Of the settings. Version 1 did not write its number; it had the same entries.
_VERSION = 2


def save(
    path: str | PathLike, settings: Settings, domains: int, embeddings: Sequence[str], layers: Mapping[str, Layer]
) -> None:
    """Writes a memory: the matrix of each layer, what was observed, and in the header all else."""
    tensors, index = {}, {}
    for name, layer in layers.items():
        index[name] = {"shape": list(layer.shape), "complement": None}
        if layer.subspace is not None:
            index[name]["complement"] = layer.subspace.complement
            tensors[f"{name}:basis"] = layer.subspace.matrix
        if layer.moment is not None:
            tensors |= {f"{name}:{key}": tensor for key, tensor in layer.moment.tensors().items()}
    facts = {"version": _VERSION, **asdict(settings), "domains": domains, "embeddings": list(embeddings)}
    storage.write(path, _KIND, tensors, settings=facts, layers=index)


def load(path: str | PathLike) -> tuple[Settings, int, list[str], list[tuple[Layer, dict[str, Tensor]]]]:
    """Settings, the number of domains, the names of embeddings, and each layer with the tensors of its moment.

    Raises:
        ValueError: the file is truncated, holds something else, or comes from a later sparse_cl.
        FileNotFoundError: there is no such file.
    """
    tensors, facts = storage.read(path, _KIND, _WRITER, "settings", "layers")
    found = facts["settings"]
    if isinstance(found, dict) and found.get("version", 1) not in (1, _VERSION):
        raise ValueError(
            f"{path}: the memory has settings of version {found['version']}, but this sparse_cl reads up to "
            f"{_VERSION}; install the sparse_cl that wrote it"
        )
    try:
        settings = Settings(**{field.name: found[field.name] for field in fields(Settings)})
        layers = [_layer(name, entry, tensors) for name, entry in facts["layers"].items()]
        return settings, found["domains"], found["embeddings"], layers
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
