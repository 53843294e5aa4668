"""Whether a folder may be a run's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .files import read_json
from .settings import Settings

SETTINGS = "settings.json"


class FolderError(ValueError):
    """An output folder that cannot be used."""


def check_folder(out: Path, settings: Settings) -> None:
    """Whether `out` may be this run's folder: absent, empty, or with a run of equal settings, finished or not.

    Raises:
        FolderError: it holds another run, or files that are no run's.
    """
    path = out / SETTINGS
    if path.is_file():
        if differing := differences(read_json(path), settings.to_json()):
            raise FolderError(f"{out} holds another run (it differs in {differing}). Give another --out, or delete it")
    elif out.exists() and not out.is_dir():
        raise FolderError(f"{out} is a file; --out must be a folder")
    elif out.is_dir() and any(path.name != SETTINGS + ".part" for path in out.iterdir()):
        raise FolderError(f"{out} is not empty and holds no run of sparse-cl. Give another --out")


def differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Which settings differ, with both values, in words; empty where none does."""
    there, now = dict(_flat(held)), dict(_flat(wanted))
    return "; ".join(
        f"{name}: {there.get(name, 'not set')} there, {now.get(name, 'not set')} now"
        for name in sorted({*there, *now})
        if there.get(name) != now.get(name)
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names of settings, those of a mapping as `name.key`, and their values as JSON."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.dumps(value)
