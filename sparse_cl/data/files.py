"""Rows of files: JSONL, JSON, CSV, TSV, Parquet; and which files a source names."""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .records import DataError

Row = tuple[str, Any]
"""Where it stands ("file:line", or "file[row]", counted from 0), and what stands there."""

REFERENCE_CHARACTERS = 32768
"""How much of a reference text is read: its beginning."""
_SPLIT = re.compile(r"(?:^|[/._-])(train|validation|valid|dev|test|eval)(?=[./]|[-_]\d|$)")
_LONGEST_CELL = 2**31 - 1


def read_text(path: str, option: str, characters: int = REFERENCE_CHARACTERS) -> str:
    """The beginning of a file of plain text.

    Raises:
        DataError: it cannot be read as UTF-8 text, or is empty; `option` is named.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(characters)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{option} {path}: cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise DataError(f"{option} {path}: the file is empty")
    return text


def split_of(path: str) -> str | None:
    """The split that a file's name says: `code.train.jsonl`, `test-00000-of-00001.parquet`; None: it says none."""
    found = _SPLIT.findall(path.lower())
    return {"valid": "validation", "dev": "validation"}.get(found[-1], found[-1]) if found else None


def files_of(source: str) -> list[Path] | None:
    """The files that a path, a folder (with those below it) or a glob names, sorted; None: it is none of these.

    Raises:
        DataError: there is no such file, or none that is read.
    """
    path = Path(source).expanduser()
    kinds = ", ".join(READERS)
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = [file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in READERS]
        found = sorted(file for file in inside if not any(p.startswith(".") for p in file.relative_to(path).parts))
        if not found:
            raise DataError(f"{source}: the folder holds no data; expected files of {kinds}")
        return found
    if any(mark in source for mark in "*?["):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise DataError(f"{source}: no file matches")
        return found
    if source.startswith((".", "/", "~")) or path.suffix.lower() in READERS:
        raise DataError(f"{source}: no such folder or file")
    return None


def rows_of(path: Path) -> list[Row]:
    """All rows of a file.

    Raises:
        DataError: it cannot be read, is of a kind that is not read, or holds no row; file and line are named.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: expected a file of {', '.join(READERS)}")
    try:
        rows = list(reader(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not rows:
        raise DataError(f"{path}: holds no record")
    return rows


def _jsonl(path: Path) -> Iterator[Row]:
    with open(path, "rb") as lines:
        for number, encoded in enumerate(lines, 1):
            try:
                line = encoded.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8: {error}") from error
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not a line of JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}:{number}: expected an object with `prompt` and `response`, or another format's fields, "
                    f"got {type(row).__name__}"
                )
            yield f"{path}:{number}", row


def _json(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        # Many a .json file holds lines; then its first value ends before the file does.
        if error.msg != "Extra data":
            raise DataError(f"{path}:{error.lineno}: not JSON: {error}") from error
        yield from _jsonl(path)
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        if not isinstance(row, dict):
            raise DataError(f"{path}[{number}]: expected a list of objects, got {type(row).__name__}")
        yield f"{path}[{number}]", row


def _csv(path: Path) -> Iterator[Row]:
    # The standard library's reader: others guess types, and turn a response "NA" into nothing and "007" into 7.
    csv.field_size_limit(_LONGEST_CELL)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        columns: Sequence[str] | None = None
        while True:
            ended = reader.line_num
            try:
                columns = columns or reader.fieldnames
                ended = reader.line_num
                row = next(reader, None)
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{ended + 1}: not UTF-8 from here on: {error}") from error
            except csv.Error as error:
                raise DataError(f"{path}:{ended + 1}: not CSV: {error}") from error
            if row is None:
                return
            where = f"{path}:{ended + 1}"
            if None in row:
                raise DataError(f"{where}: more cells than the header has columns ({len(columns or ())})")
            yield where, {name: cell for name, cell in row.items() if cell is not None}


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path}: Parquet is read by the package pyarrow: pip install pyarrow, or sparse_cl[data]"
        ) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error
    yield from ((f"{path}[{number}]", row) for number, row in enumerate(rows))


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
"""What reads a file, by its suffix."""
