"""Memories in safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from os import PathLike
from typing import Any

from torch import Tensor

from sparse_cl import storage

from .layers import Layer
from .settings import Settings
from .subspace import Subspace
from .tables import Table

_KIND, _WRITER = "memory", "SubspaceMemory.save"

#: Of the settings and the index. Versions 1 and 2 knew directions, but not how much each is used.
_VERSION = 3


def save(
    path: str | PathLike, settings: Settings, domains: int, layers: Mapping[str, Layer], tables: Mapping[str, Table]
) -> None:
    """Writes a memory: each subspace once, what was observed, and in the header all else."""
    tensors: dict[str, Tensor] = {}
    index: dict[str, dict[str, Any]] = {}
    first: dict[int, str] = {}
    for name, layer in layers.items():
        index[name] = {"shape": list(layer.shape), "transposed": layer.transposed, "weight": layer.weight}
        index[name]["source"] = layer.source
        if (subspace := layer.subspace) is not None:
            same = first.setdefault(id(subspace), name)
            index[name] |= {"subspace": same, "outside": subspace.outside, "mean": subspace.mean}
            if same == name:
                tensors |= {f"{name}:basis": subspace.basis, f"{name}:values": subspace.values}
        if layer.moment is not None:
            tensors |= {f"{name}:{key}": tensor for key, tensor in layer.moment.tensors().items()}
    heights = {name: {"height": table.height, "opaque": table.opaque} for name, table in tables.items()}
    for name, table in tables.items():
        kept = {"shares": table.shares, "counts": table.counts}
        tensors |= {f"{name}:{key}": tensor for key, tensor in kept.items() if tensor is not None}
    facts = {"version": _VERSION, **asdict(settings), "domains": domains, "tables": heights}
    storage.write(path, _KIND, tensors, settings=facts, layers=index)


def load(path: str | PathLike) -> tuple[Settings, int, list[tuple[Layer, dict[str, Tensor]]], dict[str, Table]]:
    """Settings, the number of domains, each layer with the tensors of its moment, and tables by name.

    Raises:
        ValueError: the file is truncated, holds something else, or comes from another version of sparse_cl.
        FileNotFoundError: there is no such file.
    """
    tensors, facts = storage.read(path, _KIND, _WRITER, "settings", "layers")
    found = facts["settings"]
    if isinstance(found, dict) and found.get("version", 1) != _VERSION:
        version = found.get("version", 1)
        raise ValueError(
            f"{path}: the memory has settings of version {version}, but this sparse_cl reads {_VERSION}; "
            + ("install the sparse_cl that wrote it" if version > _VERSION else "observe the earlier domains again")
        )
    try:
        settings = Settings(**{field.name: found[field.name] for field in fields(Settings)})
        known: dict[str, Subspace] = {}
        layers = [_layer(name, entry, tensors, known) for name, entry in facts["layers"].items()]
        tables = {name: _table(name, entry, tensors) for name, entry in found["tables"].items()}
        return settings, found["domains"], layers, tables
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: the memory is damaged ({error}); write it again with {_WRITER}") from error


def _layer(
    name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], known: dict[str, Subspace]
) -> tuple[Layer, dict[str, Tensor]]:
    layer = Layer(name, tuple(entry["shape"]), **{key: entry[key] for key in ("transposed", "weight", "source")})
    if (same := entry.get("subspace")) is not None:
        if same not in known:
            basis, values = tensors[f"{same}:basis"], tensors[f"{same}:values"]
            known[same] = Subspace(basis, values, entry["outside"], entry["mean"])
        layer.subspace = known[same]
        if layer.subspace.width != layer.width:
            raise ValueError(f"the basis of {name!r} has width {layer.subspace.width}, not {layer.width}")
    keys = ("upper", "sketch", "total", "count")
    return layer, {key: tensors[f"{name}:{key}"] for key in keys if f"{name}:{key}" in tensors}


def _table(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Table:
    shares, counts = (tensors.get(f"{name}:{key}") for key in ("shares", "counts"))
    for tensor in (shares, counts):
        if tensor is not None and tensor.shape != (entry["height"],):
            raise ValueError(f"the lookups of {name!r} have shape {tuple(tensor.shape)}, not ({entry['height']},)")
    return Table(name, entry["height"], shares=shares, counts=counts, opaque=entry["opaque"])
