"""Files that are whole or not there: JSON, and the folders of trained models."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

RESULTS = "results.json"
"""Of a run that reached its end."""
BASE = "base.json"
"""The base model's scores."""
MARK = "complete.json"
"""Of a folder that was written whole: the size of each of its other files."""


class CheckpointError(ValueError):
    """A folder that is not what was written."""


def write_json(path: Path, data: Any) -> None:
    """Write whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def complete(building: Path, folder: Path) -> None:
    """Move a folder that was written whole to its place. What is there was not complete, or is written anew."""
    files = sorted(path for path in building.rglob("*") if path.is_file() and path.name != MARK)
    write_json(building / MARK, {"bytes": {str(path.relative_to(building)): path.stat().st_size for path in files}})
    if folder.exists():
        shutil.rmtree(folder)
    building.rename(folder)


def check_complete(folder: Path) -> None:
    """Whether a folder holds what `complete` put there.

    Raises:
        CheckpointError: a file is absent or has another size; it is named.
    """
    mark = folder / MARK
    if not mark.is_file():
        raise CheckpointError(f"{folder}: no {MARK}, so it was not written whole. Delete the folder")
    sizes = read_json(mark)["bytes"]
    for name, size in sizes.items():
        path = folder / name
        held = path.stat().st_size if path.is_file() else None
        if held != size:
            raise CheckpointError(
                f"{path}: {'it is absent' if held is None else f'it has {held:,} bytes'}, where {size:,} bytes were "
                f"written. Delete {folder}; the same command then learns its domain and those after it again"
            )


def is_disk_full(error: BaseException) -> bool:
    """Whether writing failed for want of space."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors and tokenizers wrap the system's error in one of their own, which has only its words; torch.save finds
    # less in its file than it wrote.
    said = str(error)
    return os.strerror(errno.ENOSPC) in said or ("inline_container.cc" in said and "unexpected pos" in said)
