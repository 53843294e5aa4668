"""Domains: records to train on, to choose by, and to score by."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_cl.data.checks import check_records, examples
from sparse_cl.data.files import READERS, files_of, split_of
from sparse_cl.data.reading import grouped, read_files, read_hub
from sparse_cl.data.records import DataError, Records, hold_out, parse_columns

from . import embedded

DEFAULT_DOMAINS = embedded.DOMAINS
DATA_HELP = (
    "folder of NAME.train.* for each domain, and NAME.test.* and NAME.eval.* if there are any; or one domain: a file "
    "(JSONL, JSON, CSV, Parquet), a folder, a quoted glob, or a data set of the Hub"
)
DOMAINS_HELP = (
    "in training order; NAME=SOURCE takes one from a file, a folder, a glob or the Hub (default: code,math,medical,"
    "general; or the only one in --data, named after it)"
)
COLUMNS_HELP = "columns with other names than the fields, as prompt=question,response=answer"
TEST_SEED, VALIDATION_SEED = 0, 1
"""Of `hold_out`; not the run's own, so that runs and probes of any seed score, and train on, the same records."""


@dataclass(frozen=True)
class Domain:
    """Records of one domain. `validation` is held out from training, for choosing settings; never train on it.

    Attributes:
        origin: what was read, and what was held out of it, in a sentence; of a domain that was read.
    """

    name: str
    train: list[dict]
    validation: list[dict]
    test: list[dict]
    eval: list[dict]
    origin: str = ""

    def splits(self) -> dict[str, list[dict]]:
        """All records by split."""
        return {"train": self.train, "validation": self.validation, "test": self.test, "eval": self.eval}


def default_domains(data: str | None) -> tuple[str, ...]:
    """The domains of `--data` where none are named.

    Raises:
        DataError: a folder of several, which nobody but the user can put in order; or there is no such folder or file.
    """
    if data is None:
        return DEFAULT_DOMAINS
    if data.startswith((".", "/", "~")):
        files_of(data)
    named = _named_in(Path(data).expanduser())
    if len(named) < 2 or set(DEFAULT_DOMAINS) <= set(named):
        return DEFAULT_DOMAINS if len(named) > 1 else tuple(named or [name_of(data)])
    raise DataError(
        f"--data {data} has several domains; name those to learn in training order: --domains {','.join(named)}"
    )


def name_of(source: str) -> str:
    """What the domain in a file, a folder, a glob or a data set is called: `support` for `data/support.train.jsonl`."""
    path = Path(re.split(r"[*?[]", source)[0]).expanduser()
    if not path.exists():  # a configuration of a data set
        path = Path(str(path).partition(":")[0])
    name = path.name.partition(".")[0] if not path.is_dir() else path.resolve().name
    if name in ("", "train"):
        name = path.resolve().parent.name
    return re.sub(r"[^\w-]+", "-", name, flags=re.ASCII).strip("-_") or "domain"


def load_domains(names: Sequence[str], data: str | None, seed: int, columns: Sequence[str] = ()) -> list[Domain]:
    """The domains in training order.

    Args:
        names: each `NAME`, taken from `data`, or `NAME=SOURCE`: a file, a folder, a glob, or a data set of the Hub
            (`DATASET[:CONFIG]`).
        data: a folder of `NAME.train.*` files; a file, a glob or a folder that is one domain; a data set of the Hub,
            with one configuration a domain if several are named; None: the embedded domains.
        seed: of the embedded generator.
        columns: `FIELD=COLUMN` for columns with other names (`parse_columns`).

    Raises:
        DataError: a domain that is absent, empty, given twice, or badly formed.
    """
    if not names:
        raise DataError("no domain given")
    renamed, folder = parse_columns(columns), Path(data or "").expanduser()
    domains: list[Domain] = []
    generated: dict[str, Any] = {}
    for entry in names:
        name, _, source = entry.partition("=")
        if not name or not name.replace("-", "").replace("_", "").isalnum():
            raise DataError(f"domain {entry!r}: a name is letters, digits, - and _")
        if name in [domain.name for domain in domains]:
            raise DataError(f"domain {name!r} is given twice")
        if source:
            domains.append(_read_source(name, source, renamed))
        elif data is None:
            if name not in embedded.DOMAINS:
                raise DataError(
                    f"unknown embedded domain {name!r}; there are {', '.join(embedded.DOMAINS)}. "
                    "For your own, give --data"
                )
            generated = generated or embedded.generate(seed)
            domains.append(Domain(name=name, **generated[name]))
        elif folder.is_dir() and (len(names) > 1 or _named_in(folder)):
            domains.append(read_folder(folder, name, renamed))
        elif len(names) > 1 and files_of(data):
            raise DataError(
                f"--data {data} is one domain, and {len(names)} are named; give a folder, or NAME=FILE each"
            )
        elif files_of(data) is None and name != name_of(data):
            domains.append(_read_source(name, f"{data}:{name}", renamed))
        else:
            domains.append(_read_source(name, data, renamed))
    return domains


def read_folder(folder: Path, name: str, columns: Mapping[str, str] | None = None) -> Domain:
    """The domain in `<folder>/<name>.{train,validation,test,eval}.*`; all but the first may be absent."""
    train = _file(folder, f"{name}.train")
    if train is None:
        raise DataError(
            f"domain {name!r}: no file {folder / name}.train.jsonl (or {', '.join(READERS)}); "
            f"domains with a train file in this folder: {', '.join(_named_in(folder)) or 'none'}"
        )
    return _domain(name, _read({"train": [train], **_beside(folder, f"{name}.")}, columns))


def _read_source(name: str, source: str, columns: Mapping[str, str]) -> Domain:
    """The domain in a file (with those of its other splits beside it), a folder, a glob, or a data set of the Hub."""
    files = files_of(source)
    path = Path(source).expanduser()
    if files is None:
        try:
            return _domain(name, read_hub(source, columns))
        except DataError as error:
            raise DataError(f"domain {name!r}: {error}") from error
    if path.is_file():
        stem = re.sub(r"train$", "", path.stem) if split_of(path.name) == "train" else f"{path.stem}."
        return _domain(name, _read({"train": files, **_beside(path.parent, stem)}, columns))
    by_split = grouped(files, path if path.is_dir() else None)
    if "train" not in by_split:
        raise DataError(f"domain {name!r}: {source} has no training file, only {', '.join(by_split)}")
    return _domain(name, _read(by_split, columns))


def _read(files: Mapping[str, Sequence[Path]], columns: Mapping[str, str] | None) -> dict[str, Records]:
    return {split: read_files(paths, columns, for_eval=split == "eval") for split, paths in files.items()}


def _domain(name: str, read: Mapping[str, Records]) -> Domain:
    """The domain of records by split, of which only "train" must be there.

    Without a test, a hash holds out that and a validation; with one the last training records (5 %, at most 256) are
    the validation.
    """
    train, validation, test = read["train"], read.get("validation"), read.get("test")
    origin = f"{name}: {train.describe()}"
    if test is None:
        train, test = hold_out(train, TEST_SEED)
        origin += f"; a hash of their content holds out {len(test):,} to be scored"
        if validation is None:
            train, validation = hold_out(train, VALIDATION_SEED)
            origin += f" and {len(validation):,} as validation"
    learned, kept = list(train), list(validation or ())
    if not kept:
        if len(learned) < 2:
            raise DataError(
                f"{train.source}: {len(learned)} training record; need at least 2, one is held out as validation"
            )
        size = min(256, max(1, len(learned) // 20))
        learned, kept = learned[:-size], learned[-size:]
        origin += f"; the last {size:,} are held out as validation"
    return Domain(name, [*learned], [*kept], [*test], [*read.get("eval", ())], origin)


def _file(folder: Path, stem: str) -> Path | None:
    """The file `stem.*` of a folder, of a kind that is read."""
    found = [path for path in (folder / (stem + kind) for kind in READERS) if path.is_file()]
    if len(found) > 1:
        raise DataError(f"{found[0]} and {found[1].name} are the same split of a domain; keep one of them")
    return found[0] if found else None


def _beside(folder: Path, stem: str) -> dict[str, list[Path]]:
    """Files of the other splits, `stem` before their names, by split."""
    found = {split: _file(folder, stem + split) for split in ("validation", "test", "eval")}
    return {split: [path] for split, path in found.items() if path}


def _named_in(folder: Path) -> list[str]:
    """Domains with a file `NAME.train.*` in a folder."""
    files = [path for path in folder.glob("*.train.*") if path.suffix in READERS]
    return sorted({path.name.rpartition(".train.")[0] for path in files})


def show_domains(domains: Sequence[Domain], model: str | None, max_length: int) -> str:
    """What was read of each domain, and the first of its training records token by token; see `examples`.

    Args:
        model: whose tokenizer; None: the embedded model's.

    Raises:
        DataError: a record that the model could not learn from.
    """
    from sparse_cl.models.loading import load_tokenizer, quiet

    from .embedded_model import embedded_model_folder

    quiet()
    tokenizer, rows = load_tokenizer(model or str(embedded_model_folder()))
    check_domains(domains, tokenizer, rows, max_length)
    return "\n\n".join(
        f"{domain.origin or domain.name + ': embedded'}\n{examples(domain.train, tokenizer, max_length)}"
        for domain in domains
    )


def check_domains(domains: Sequence[Domain], tokenizer: Any, rows: int, max_length: int) -> None:
    """Whether a model can learn from, and be scored on, all records of some domains; see `check_records`."""
    for domain in domains:
        for records in domain.splits().values():
            check_records(records, tokenizer, rows, max_length)
