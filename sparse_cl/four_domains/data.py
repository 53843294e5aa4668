"""Domains: where their records come from.

A record is a dict with `prompt` and `response` (str). A record for evaluation also has `choices` (list of str),
`answer` and `answer_index` (into `choices`), or `answer` alone; one with `tests` would need its code to be run and
is scored by the likelihood of its response only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import embedded

DEFAULT_DOMAINS = embedded.DOMAINS
REFERENCE_CHARACTERS = 32768
"""How much of a reference text is read: its beginning."""


@dataclass(frozen=True)
class Domain:
    """Records of one domain. `validation` is held out from training, for choosing settings; never train on it."""

    name: str
    train: list[dict]
    validation: list[dict]
    test: list[dict]
    eval: list[dict]


class DataError(ValueError):
    """Data that cannot be used. The message says where it stands and what was expected."""


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


def check_record(record: object, where: str, *, for_eval: bool) -> dict:
    """`record` itself if it is a record as described above; else DataError, which names `where`."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with `prompt` and `response`, got {type(record).__name__}")
    for field in ("prompt", "response"):
        if not isinstance(record.get(field), str):
            given = type(record[field]).__name__ if field in record else "no such field"
            raise DataError(f"{where}: `{field}` must be a string, got {given} (fields: {sorted(record)})")
    if not record["response"].strip():
        raise DataError(f"{where}: `response` is empty; there is nothing to learn or to score")
    if for_eval and record.get("choices") is not None:
        index, choices = record.get("answer_index"), record["choices"]
        if not isinstance(choices, list) or not isinstance(index, int) or not 0 <= index < len(choices):
            raise DataError(
                f"{where}: a record with `choices` needs a list and an `answer_index` into it, "
                f"got choices={choices!r}, answer_index={index!r}"
            )
        for number, choice in enumerate(choices):
            if not isinstance(choice, str) or not choice:
                raise DataError(f"{where}: `choices` must be strings that are not empty, got {choice!r} at {number}")
        if record.get("answer") in (None, ""):
            raise DataError(f"{where}: a record with `choices` needs its `answer` too, as it stands in the response")
    return record


def read_jsonl(path: Path, *, for_eval: bool = False) -> list[dict]:
    """The records of a JSONL file, one object a line; empty lines are skipped.

    Raises:
        DataError: a line that is no JSON or no record (with file and line number), or no record at all.
        FileNotFoundError: no such file.
    """
    records = []
    with open(path, "rb") as lines:
        for number, encoded in enumerate(lines, 1):
            try:
                line = encoded.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8: {error}") from error
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not a line of JSON: {error}") from error
            records.append(check_record(record, f"{path}:{number}", for_eval=for_eval))
    if not records:
        raise DataError(f"{path}: holds no record; expected one JSON object a line with `prompt` and `response`")
    return records


def _domain(name: str, records: dict[str, list[dict]], where: str) -> Domain:
    """The domain of records by split; without validation, the last training records (5 %, at most 256) are that."""
    train, validation = records["train"], records.get("validation")
    if not validation:
        if len(train) < 2:
            raise DataError(f"{where}: {len(train)} training record; need at least 2, one is held out as validation")
        size = min(256, max(1, len(train) // 20))
        train, validation = train[:-size], train[-size:]
    return Domain(name, train, validation, records["test"], records.get("eval", []))


def read_folder(folder: Path, name: str) -> Domain:
    """The domain in `<folder>/<name>.{train,test,eval}.jsonl` (eval may be absent)."""
    paths = {split: folder / f"{name}.{split}.jsonl" for split in ("train", "test", "eval")}
    for split in ("train", "test"):
        if not paths[split].is_file():
            present = sorted({path.name.split(".")[0] for path in folder.glob("*.train.jsonl")})
            raise DataError(
                f"domain {name!r}: no file {paths[split]}; "
                f"domains with a train file in this folder: {', '.join(present) or 'none'}"
            )
    there = {split: path for split, path in paths.items() if path.is_file()}
    records = {split: read_jsonl(path, for_eval=split == "eval") for split, path in there.items()}
    return _domain(name, records, str(paths["train"]))


def read_hub(name: str, source: str, config: str | None = None) -> Domain:
    """The domain `name` in a data set of the Hugging Face Hub (or a local one that `datasets` can load).

    Splits: train and test, and where there are such: validation, eval. Columns as in a record.
    """
    where = f"data set {source}" + (f" ({config})" if config else "")
    try:
        import datasets

        splits = datasets.load_dataset(source, config)
    except ModuleNotFoundError as error:
        raise DataError(f"domain {name!r}: {where} is read by the package datasets: pip install datasets") from error
    except Exception as error:  # `datasets` raises many kinds, of several libraries
        raise DataError(f"domain {name!r}: cannot load {where}: {error}") from error
    for split in ("train", "test"):
        if split not in splits:
            raise DataError(f"domain {name!r}: {where} has no split {split!r}; it has {', '.join(splits)}")
        if not len(splits[split]):
            raise DataError(f"domain {name!r}: {where}, split {split!r} holds no record")
    records: dict[str, list[dict]] = {}
    for split in ("train", "validation", "test", "eval"):
        rows = [{key: value for key, value in row.items() if value is not None} for row in splits.get(split, ())]
        records[split] = [
            check_record(row, f"{where}, {split}[{number}]", for_eval=split == "eval")
            for number, row in enumerate(rows)
        ]
    return _domain(name, records, where)


def load_domains(names: Sequence[str], data: str | None, seed: int) -> list[Domain]:
    """The domains in training order.

    Args:
        names: each `NAME`, taken from `data`, or `NAME=DATASET[:CONFIG]`, a data set of the Hub.
        data: a folder of JSONL files; or a data set of the Hub with one configuration a domain; None: the
            embedded domains.
        seed: of the embedded generator.

    Raises:
        DataError: a domain that is absent, empty, given twice, or badly formed.
    """
    if not names:
        raise DataError("no domain given")
    domains: list[Domain] = []
    generated = None
    for entry in names:
        name, _, source = entry.partition("=")
        if not name or not name.replace("-", "").replace("_", "").isalnum():
            raise DataError(f"domain {entry!r}: a name is letters, digits, - and _")
        if name in [domain.name for domain in domains]:
            raise DataError(f"domain {name!r} is given twice")
        if source:
            dataset, _, config = source.partition(":")
            domains.append(read_hub(name, dataset, config or None))
        elif data is None:
            if name not in embedded.DOMAINS:
                raise DataError(
                    f"unknown embedded domain {name!r}; there are {', '.join(embedded.DOMAINS)}. "
                    "For your own, give --data DIR"
                )
            generated = generated or embedded.generate(seed)
            domains.append(Domain(name, **generated[name]))
        elif Path(data).is_dir():
            domains.append(read_folder(Path(data), name))
        elif Path(data).exists() or data.startswith((".", "/", "~")):
            kind = "is a file, expected a folder" if Path(data).exists() else "no such folder"
            raise DataError(f"--data {data}: {kind} with DOMAIN.train.jsonl and DOMAIN.test.jsonl")
        else:
            domains.append(read_hub(name, data, name))
    return domains
