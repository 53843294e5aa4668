"""What a model folder carries beside the model: the memory of what was learned, and a list of what that was.

    <folder>/sparse_cl/memory.safetensors   the SubspaceMemory; absent where the method keeps none
    <folder>/sparse_cl/history.json         {"version": 1, "domains": [...], "memory": sha256 of the file or null}

A fresh process goes on where the last one ended:

    model = AutoModelForCausalLM.from_pretrained(folder)
    carried = load_carried(folder, model)
    method = Elastic()
    if carried and carried.memory:
        method.remember(model, carried.memory)

Where the folder holds an adapter of `elastic-lora` or `orthogonal-lora`, `method.restore(base, [folder])` does both:
their memory is of the base model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sparse_cl.subspace import SubspaceMemory

FOLDER = "sparse_cl"
MEMORY = f"{FOLDER}/memory.safetensors"
HISTORY = f"{FOLDER}/history.json"
_VERSION = 1
#: Of a file of weights so many blocks of so many bytes tell whether it has changed.
_BLOCKS, _BLOCK = 64, 1 << 16


@dataclass
class Carried:
    """What was learned before.

    Attributes:
        memory: None: no method that keeps one has trained the model.
        domains: one entry for each domain, in order, as JSON holds it: at least "name"; by convention also "method",
            "options", "lr", "steps", "records", "data", the fingerprint of the data, and "weights", some entries of
            some weights as they were then.
    """

    memory: SubspaceMemory | None = None
    domains: list[dict[str, Any]] = field(default_factory=list)


def load_carried(folder: str | Path, model: nn.Module | None = None) -> Carried | None:
    """What a model folder carries; None: nothing, as of a model that sparse_cl never trained.

    Args:
        folder: of a model, or a model's name on the Hub.
        model: the memory is bound to it; None: it is bound later, by `Method.remember`.

    Raises:
        ValueError: a file is damaged or of another version, the two do not belong together, or the memory is of
            another model; the folder is named, and what differs. Or there is no such folder, and the Hub does not
            answer.
    """
    history, memory = _file(folder, HISTORY), _file(folder, MEMORY)
    if history is None and memory is None:
        return None
    domains: list[dict[str, Any]] = []
    if history is not None:
        domains, digest = _read(folder, history)
        if digest != (None if memory is None else _digest(memory)):
            what = (
                "is absent" if memory is None else "is another one" if digest else "was not there when it was written"
            )
            raise ValueError(
                f"{folder}: {HISTORY} and {MEMORY} do not belong together: the memory {what}. Take both from one copy "
                f"of the model, or delete {FOLDER}/ to go on without what was remembered"
            )
    try:
        return Carried(None if memory is None else SubspaceMemory.load(memory, model), domains)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def save_carried(folder: str | Path, carried: Carried) -> None:
    """Writes both files into a model folder, each aside first and then moved to its place.

    A process that is killed between the two moves leaves files that `load_carried` refuses.

    Raises:
        ValueError: an entry of `domains` without a name, or that JSON cannot hold; nothing is written then.
    """
    for number, domain in enumerate(carried.domains):
        if not isinstance(domain, dict) or not isinstance(domain.get("name"), str):
            raise ValueError(f"domains: expected entries with a name, got {domain!r} as number {number}")
    folder, digest = Path(folder), None
    try:
        json.dumps(carried.domains, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"domains: expected what JSON can hold: {error}") from error
    if carried.memory is None:
        (folder / MEMORY).unlink(missing_ok=True)
    else:
        save_memory(folder, carried.memory)
        digest = _digest(folder / MEMORY)
    history = {"version": _VERSION, "domains": carried.domains, "memory": digest}
    move_in(folder / HISTORY, lambda part: part.write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8"))


def save_memory(folder: Path, memory: SubspaceMemory) -> None:
    """The memory alone, written aside and moved to its place in a model folder."""
    move_in(folder / MEMORY, memory.save)


def memory_path(folder: Path) -> Path:
    """Where the memory of a model folder is. Older versions of sparse_cl wrote it beside the model."""
    older = folder / Path(MEMORY).name
    return older if older.is_file() and not (folder / MEMORY).is_file() else folder / MEMORY


def move_in(path: Path, write: Callable[[Path], Any]) -> None:
    """Has a file written aside, then moves it to its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _file(folder: str | Path, name: str) -> Path | None:
    """The file, of a folder or of a model on the Hub; None: there is none."""
    if Path(folder).is_dir():
        path = memory_path(Path(folder)) if name == MEMORY else Path(folder) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(folder), name))
    except (OSError, ValueError) as error:  # whether the Hub says no, or is not there
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        known = isinstance(error, LocalEntryNotFoundError) and try_to_load_from_cache(str(folder), name)
        if known is not None and not isinstance(known, str | bool):
            return None  # the Hub said so when it was last asked
        raise ValueError(
            f"{folder}: neither a folder nor a model on the Hub that could be asked for {name} "
            f"({type(error).__name__}), and without it what was learned before would not be protected. Download the "
            "model whole, and give its folder"
        ) from error


def _read(folder: str | Path, path: Path) -> tuple[list[dict[str, Any]], str | None]:
    try:
        history = json.loads(path.read_text(encoding="utf-8"))
        version, domains, digest = history["version"], history["domains"], history["memory"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: {HISTORY} is damaged ({type(error).__name__}: {error}); expected what sparse_cl wrote, with "
            "version, domains and memory"
        ) from error
    if version != _VERSION:
        raise ValueError(
            f"{folder}: {HISTORY} has version {version}, but this sparse_cl reads {_VERSION}; install the sparse_cl "
            "that wrote it"
        )
    return domains, digest


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def fingerprint(folder: str) -> str | None:
    """SHA-256 of what tells a model's folder from another; None: it is on the Hub.

    Of weights the size and some blocks are read, spread over the file, as all of it takes as long to read as to load.
    """
    if not Path(folder).is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin"), Path(folder) / HISTORY]):
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for place in range(_BLOCKS + 1):
                    file.seek(max(0, size - _BLOCK) * place // _BLOCKS)
                    digest.update(file.read(_BLOCK))
    return digest.hexdigest()
