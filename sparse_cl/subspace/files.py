"""Memories in safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparse_cl.subspace.layers import Layer
from sparse_cl.subspace.subspace import Subspace

if TYPE_CHECKING:
    from sparse_cl.subspace.memory import SubspaceMemory

_FORMAT = "sparse_cl.subspace_memory"
_VERSION = "1"
_SETTINGS = ("max_rank", "energy", "source", "oversample", "seed", "domains", "embeddings")


def save(memory: SubspaceMemory, layers: Mapping[str, Layer], path: str | PathLike) -> None:
    """Writes a memory: a matrix a layer, what was observed, and in the header all else."""
    from safetensors.torch import save_file

    tensors, index = {}, {}
    for name, layer in layers.items():
        index[name] = {"shape": list(layer.shape), "complement": None}
        if layer.subspace is not None:
            index[name]["complement"] = layer.subspace.complement
            tensors[f"{name}:basis"] = layer.subspace.matrix
        if layer.moment is not None:
            tensors |= {f"{name}:{key}": tensor for key, tensor in layer.moment.tensors().items()}
    settings = {key: getattr(memory, key) for key in _SETTINGS}
    metadata = {"format": _FORMAT, "version": _VERSION, "settings": json.dumps(settings), "layers": json.dumps(index)}
    save_file({key: t.cpu().contiguous().clone() for key, t in tensors.items()}, path, metadata=metadata)


def load(path: str | PathLike) -> tuple[dict[str, Any], list[tuple[Layer, dict[str, Tensor]]]]:
    """Settings, and each layer with the tensors of its moment.

    Raises:
        ValueError: the file is truncated, or holds something else.
        FileNotFoundError: there is no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(
                    f"{path}: holds no memory of sparse_cl; expected a file written by SubspaceMemory.save"
                )
            if metadata.get("version") != _VERSION:
                raise ValueError(
                    f"{path}: memory format version {metadata.get('version')}, but this sparse_cl reads {_VERSION}; "
                    "install the sparse_cl that wrote it"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        settings = json.loads(metadata["settings"])
        settings = {key: settings[key] for key in _SETTINGS}
        layers = []
        for name, entry in json.loads(metadata["layers"]).items():
            layer = Layer(name, tuple(entry["shape"]))
            if entry["complement"] is not None:
                layer.subspace = Subspace(tensors[f"{name}:basis"], entry["complement"])
                if layer.subspace.width != layer.width:
                    raise ValueError(f"the basis of {name!r} has width {layer.subspace.width}, not {layer.width}")
            keys = ("moment", "sketch", "energies")
            layers.append((layer, {key: tensors[f"{name}:{key}"] for key in keys if f"{name}:{key}" in tensors}))
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable memory file ({error}); write it again with save") from error
    return settings, layers
