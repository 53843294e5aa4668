"""Sixteen domains from four: training files split by the `source` that each of their records names.

    python -m benchmarks.arena.sources --data DIR --out DIR

Writes NAME.train.jsonl and NAME.test.jsonl for each of `SOURCES`, records in the order in which they stand, the last
`HELD_OUT` of each held out. The same files give the same bytes. `sparse-cl run --data OUT --domains` takes the folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

HELD_OUT = 48
SOURCES = (
    "sql-create-context",
    "mawps",
    "medquad",
    "creak",
    "mbpp",
    "gsm8k",
    "medmcqa",
    "topical-chat",
    "aqua-rat",
    "pubmedqa",
    "sensemaking",
    "svamp",
    "strategyqa",
    "ecqa",
    "qasc",
    "dolly-15k-subset",
)
"""In training order: code, math, medicine and general text take turns as long as there are any."""


def split_by_source(files: Iterable[Path]) -> dict[str, list[str]]:
    """Source → its records as lines, in the order of the files and of their lines.

    Raises:
        ValueError: a record without a source.
    """
    found: dict[str, list[str]] = {}
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
            source = json.loads(line).get("source")
            if not source:
                raise ValueError(f"{path}:{number}: expected a record with a source, which names the domain it goes to")
            found.setdefault(source, []).append(line)
    return found


def write_sources(data: Path, out: Path) -> Mapping[str, int]:
    """Write the folder; source → records to train on.

    Args:
        data: folder of `*.train.jsonl`, each record with `source`.
        out: folder, made if it is absent.

    Raises:
        ValueError: a source of `SOURCES` is absent, or has no more than `HELD_OUT` records; nothing is written then.
    """
    by_source = split_by_source(sorted(data.glob("*.train.jsonl")))
    for name in SOURCES:
        if len(lines := by_source.get(name, [])) <= HELD_OUT:
            raise ValueError(
                f"data: {data} has {len(lines)} training records of {name}; expected more than {HELD_OUT}, which are "
                "held out"
            )
    out.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        lines = by_source[name]
        for split, part in (("train", lines[:-HELD_OUT]), ("test", lines[-HELD_OUT:])):
            (out / f"{name}.{split}.jsonl").write_text("".join(f"{line}\n" for line in part), encoding="utf-8")
    return {name: len(by_source[name]) - HELD_OUT for name in SOURCES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "out"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    given = parser.parse_args()
    for name, records in write_sources(given.data, given.out).items():
        print(f"{name}: {records} to train on, {HELD_OUT} held out")


if __name__ == "__main__":
    main()
