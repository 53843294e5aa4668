"""Records from files, folders, globs and the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from .files import Row, files_of, rows_of, split_of
from .records import DataError, Format, Record, Records

_AND = " and "
"""Between formats, where the files of a source have several."""


SCORED = ("test", "eval", "validation", "train")
"""Splits of records to score by: the first that a source has."""


def read_records(
    sources: Sequence[str], columns: Mapping[str, str] | None = None, splits: Sequence[str] = ("train",)
) -> Records:
    """All records of some sources, in their order, to learn unless told otherwise.

    Args:
        sources: each a file (JSONL, JSON, CSV, TSV, Parquet), a folder, a glob, or `NAME[:CONFIG]` of the Hub. Of a
            folder or a data set of the Hub that has splits, one is taken; a folder's files say their split in their
            names (`law.train.jsonl`, `test-00000.parquet`).
        columns: {field: column} for columns that have other names than the fields of `FORMATS`.
        splits: which is taken: the first that the source has.

    Raises:
        DataError: something that cannot be read, or is no record; file, line and field are named.
    """
    if isinstance(sources, str):
        raise TypeError(f"sources must be a list of sources, got one string; give [{sources!r}]")
    if not sources:
        raise DataError("no data given; expected files, folders, globs or names on the Hub")
    parts = []
    for source in sources:
        files = files_of(source)
        if files is None:
            found = read_hub(source, columns)
            parts.append(next(found[split] for split in splits if split in found))
            continue
        left = ""
        if Path(source).expanduser().is_dir():
            by_split = grouped(files, Path(source).expanduser())
            if not (chosen := next((by_split[split] for split in splits if split in by_split), [])):
                raise DataError(
                    f"{source}: the folder has no training file, only {', '.join(by_split)}: {_named(files)}"
                )
            unnamed = sorted({*files} - {*chain.from_iterable(by_split.values())})
            left = f"without {_named(unnamed)}, whose name says no split" if unnamed else ""
            files = chosen
        read = read_files(files, columns)
        parts.append(replace(read, chosen=left) if left else read)
    if len(parts) == 1:
        return parts[0]
    formats = dict.fromkeys(form for part in parts for form in part.format.split(_AND))
    sources = ", ".join(part.source + f" ({part.chosen})" * bool(part.chosen) for part in parts)
    return Records([record for part in parts for record in part], _AND.join(formats), sources)


def grouped(files: Sequence[Path], folder: Path | None) -> dict[str, list[Path]]:
    """Files by the split that their names say; if none says "train", those that say nothing are that.

    Args:
        folder: the names of folders between it and a file count too; None: only the file's own name.
    """
    found: dict[str | None, list[Path]] = {}
    for file in files:
        found.setdefault(split_of(file.relative_to(folder).as_posix() if folder else file.name), []).append(file)
    unnamed = found.pop(None, [])
    by_split = {str(split): paths for split, paths in found.items()}
    return by_split if "train" in by_split or not unnamed else {"train": unnamed, **by_split}


def read_files(files: Sequence[Path], columns: Mapping[str, str] | None = None, *, for_eval: bool = False) -> Records:
    """The records of some files, each of which may be of another kind and format."""
    records: list[Record] = []
    formats: dict[str, None] = {}
    for file in files:
        form, found = _records(rows_of(file), columns, str(file), for_eval)
        formats[form] = None
        records += found
    return Records(records, _AND.join(formats), _named(files))


def read_hub(source: str, columns: Mapping[str, str] | None = None) -> dict[str, Records]:
    """The records of a data set of the Hub by split, at least "train"; a data set of one split is that.

    Args:
        source: `NAME[:CONFIG]`.
    """
    name, _, config = source.partition(":")
    where = f"data set {name}" + (f" ({config})" if config else "")
    try:
        import datasets

        splits = datasets.load_dataset(name, config or None)
    except ModuleNotFoundError as error:
        raise DataError(
            f"{where} is no file or folder here, and is read from the Hub by the package datasets: pip install "
            "datasets, or sparse_cl[data]"
        ) from error
    except Exception as error:  # `datasets` raises many kinds, of several libraries
        raise DataError(f"cannot load {where}, which is no file or folder here: {error}") from error
    found: dict[str, Any] = {
        split: splits[split] for split in ("train", "validation", "test", "eval") if split in splits
    }
    if "train" not in found:
        if len(splits) > 1:
            raise DataError(f"{where} has no split 'train'; it has {', '.join(splits)}")
        found = {"train": next(iter(splits.values()))}
    read = {}
    for split, rows in found.items():
        placed = [(f"{where}, {split}[{number}]", row) for number, row in enumerate(rows)]
        if not placed:
            raise DataError(f"{where}, split {split!r} holds no record")
        form, records = _records(placed, columns, f"{where}, split {split!r}", split == "eval")
        read[split] = Records(records, form, where)
    return read


def _records(
    rows: Sequence[Row], columns: Mapping[str, str] | None, file: str, for_eval: bool
) -> tuple[str, list[Record]]:
    """The format of a file's rows, and their records."""
    form = Format((column for _, row in rows for column in row), columns or {}, file)
    return form.name, [form.record(row, where, for_eval=for_eval) for where, row in rows]


def _named(files: Sequence[Path]) -> str:
    """Files in words; many are counted."""
    return ", ".join(map(str, files)) if len(files) < 4 else f"{files[0]} and {len(files) - 1} files like it"
