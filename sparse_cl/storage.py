"""Our safetensors files: tensors, and in the header what kind of file it is, its version, and some JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import Tensor

_VERSION = "1"


def write(path: str | PathLike, kind: str, tensors: Mapping[str, Tensor], **facts: Any) -> None:
    """Writes tensors and facts (what JSON can hold)."""
    from safetensors.torch import save_file

    header = {"format": f"sparse_cl.{kind}", "version": _VERSION} | {k: json.dumps(v) for k, v in facts.items()}
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path, metadata=header)


def read(path: str | PathLike, kind: str, writer: str, *names: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and the facts with these names.

    Args:
        kind: as given to :func:`write`.
        writer: the public function that writes such files, for error messages.

    Raises:
        ValueError: the file is truncated, not a safetensors file, of another kind or version, or lacks a fact.
        FileNotFoundError: there is no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            if header.get("format") != f"sparse_cl.{kind}":
                raise ValueError(f"{path}: holds no {kind} of sparse_cl; expected a file written by {writer}")
            if header.get("version") != _VERSION:
                raise ValueError(
                    f"{path}: {kind} format version {header.get('version')}, but this sparse_cl reads {_VERSION}; "
                    "install the sparse_cl that wrote it"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, {name: json.loads(header[name]) for name in names}
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable {kind} file ({error}); write it again with {writer}") from error
