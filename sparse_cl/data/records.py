"""Records: what they may look like, and one form for all of them.

A normalised record is a dict with

* `prompt` and `response` (str); for evaluation also `choices` (list of str), `answer` and `answer_index` (into
  `choices`), or `answer` alone; one with `tests` would need its code to be run and is scored by the likelihood of its
  response only;
* or `messages` (list of {"role", "content"});
* or `text` (str), with `goes_on` where its next piece is another record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

FORMATS = {
    "prompt/response": ("prompt", "response"),
    "prompt/completion": ("prompt", "completion"),
    "messages": ("messages",),
    "instruction/input/output": ("instruction", "output"),
    "text": ("text",),
}
"""The columns that each format needs, in the order in which they are looked for; `input` may be absent or empty."""
EXTRAS = ("answer", "answer_index", "choices", "tests")
"""What an evaluation reads besides."""
FIELDS = ("prompt", "response", "completion", "messages", "instruction", "input", "output", "text", *EXTRAS)
ASSISTANT = "assistant"
HELD_OUT = 256
"""Records that are held out at most."""


class DataError(ValueError):
    """Data that cannot be used. The message says where it stands and what was expected."""


class Record(dict):
    """A normalised record, which knows where it came from: `where`, as "file:line"."""

    __slots__ = ("where",)
    where: str

    @classmethod
    def at(cls, where: str, **fields: Any) -> Record:
        record = cls(fields)
        record.where = where
        return record

    def content(self) -> str:
        """What is learned of it, as JSON: equal for records that teach the same."""
        taught = {field: self[field] for field in ("prompt", "response", "messages", "text") if field in self}
        return json.dumps(taught, sort_keys=True, default=str)


@dataclass(frozen=True)
class Records(Sequence):
    """Normalised records of one source.

    Attributes:
        records: each a dict in the form above.
        format: the format that was found, of `FORMATS`.
        source: where they came from, in words.
        chosen: how they were chosen of it, in words; empty: they are all of it.
    """

    records: list[Record]
    format: str
    source: str
    chosen: str = ""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        return self.records[index]

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @property
    def where(self) -> list[str]:
        """The place of each record, as "file:line"."""
        return [record.where for record in self.records]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the records in their order, whatever file they stood in."""
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(json.dumps(record, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()

    def describe(self) -> str:
        """One line: how many records, of which format, from where, and how they were chosen."""
        count = f"{len(self):,} record{'s' * (len(self) != 1)}"
        return f"{count} ({self.format}) from {self.source}{', ' * bool(self.chosen)}{self.chosen}"


def hold_out(records: Records, seed: int, share: float = 0.05) -> tuple[Records, Records]:
    """Split off records to score by: `share` of them, at least 1, at most `HELD_OUT`.

    A hash of the seed and of each record's content chooses, so the same records are held out in whatever order they
    stand, and records that teach the same stay on one side. Where that leaves no other way, more are held out: the
    fewest copies of one record.

    Returns:
        Training records and held-out records, each in the order of `records`.

    Raises:
        DataError: all records teach the same.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be above 0 and below 1, got {share}")
    copies: dict[str, int] = {}
    contents = [record.content() for record in records]
    for content in contents:
        copies[content] = copies.get(content, 0) + 1
    if len(copies) < 2:
        raise DataError(
            f"{records.source}: {len(records)} training record{'s' * (len(records) != 1)}, {len(copies)} of them "
            "different; need at least 2, as one is held out to be scored"
        )
    key = hashlib.sha256(str(seed).encode()).digest()
    order = sorted(copies, key=lambda content: hashlib.sha256(key + content.encode()).digest())
    room = min(HELD_OUT, max(1, int(share * len(records))))
    taken = set()
    for content in order:
        if copies[content] <= room:
            taken.add(content)
            room -= copies[content]
    taken = taken or {min(order, key=copies.__getitem__)}
    held = [content in taken for content in contents]
    how = f"by a hash of their content with seed {seed}"
    return (
        _part(records, [not one for one in held], f"without the {sum(held):,} held out {how}"),
        _part(records, held, f"held out of {len(records):,} {how}"),
    )


def _part(records: Records, wanted: Sequence[bool], chosen: str) -> Records:
    kept = [record for record, want in zip(records, wanted, strict=True) if want]
    return replace(records, records=kept, chosen=", ".join(filter(None, (records.chosen, chosen))))


def parse_columns(entries: Iterable[str]) -> dict[str, str]:
    """`FIELD=COLUMN` entries of `--columns` as {field: column}.

    Raises:
        DataError: an entry of another form, or a field that is unknown.
    """
    columns = {}
    for entry in entries:
        field, equals, column = entry.partition("=")
        if not equals or not column.strip() or field.strip() in columns:
            raise DataError(f"--columns {entry}: expected FIELD=COLUMN, each field once, as in prompt=question")
        columns[field.strip()] = column.strip()
    check_columns(columns)
    return columns


def check_columns(columns: Mapping[str, str]) -> None:
    """Whether `columns` names fields that there are.

    Raises:
        DataError: it does not.
    """
    if unknown := [field for field in columns if field not in FIELDS]:
        raise DataError(f"columns: no format has a field {unknown[0]!r}; there are {', '.join(FIELDS)}")


class Format:
    """How the rows of one file become records.

    Args:
        found: the columns of the file.
        columns: {field: column} for those that have another name than their field.
        file: for errors.

    Raises:
        DataError: a column of `columns` is absent, or the columns are of no format.
    """

    def __init__(self, found: Iterable[str], columns: Mapping[str, str], file: str) -> None:
        found = list(dict.fromkeys(found))
        check_columns(columns)
        if absent := [f"{field}={column}" for field, column in columns.items() if column not in found]:
            raise DataError(f"{file}: columns {', '.join(absent)}: there is no such column; there are {_listed(found)}")
        # A column that stands for another field is not its own any more: GSM8K's `answer`, given as `response`.
        free = [field for field in FIELDS if field in columns or field not in columns.values()]
        self.names = {field: columns.get(field, field) for field in free}
        asked = {field for field in columns if field not in EXTRAS}
        for name, needed in FORMATS.items():
            fields = (*needed, "input") if name.startswith("instruction") else needed
            if asked <= set(fields) and all(self.names.get(field) in found for field in needed):
                self.name = name
                return
        forms = "; ".join(" and ".join(needed) for needed in FORMATS.values())
        raise DataError(
            f"{file}: no format has these columns: {_listed(found)}. Expected one of: {forms}. Say which column is "
            "which: --columns prompt=COLUMN,response=COLUMN (in Python: columns={'prompt': ..., 'response': ...})"
        )

    def record(self, row: Mapping[str, Any], where: str, *, for_eval: bool = False) -> Record:
        """A row as a normalised record.

        Raises:
            DataError: it is none; `where` and the field are named.
        """
        if self.name == "messages":
            return Record.at(where, messages=self._messages(row, where))
        if self.name == "text":
            return Record.at(where, text=self._taught(row, "text", where))
        first, second = FORMATS[self.name]
        prompt, response = self._string(row, first, where), self._taught(row, second, where)
        if self.name.startswith("instruction") and "input" in self.names and row.get(self.names["input"]):
            prompt += "\n\n" + self._string(row, "input", where)
        extras = {field: self._parsed(row, field) for field in EXTRAS}
        record = Record.at(where, prompt=prompt, response=response)
        record |= {field: value for field, value in extras.items() if value not in (None, "")}
        if for_eval:
            _check_eval(record, where)
        elif not _is_words(record.get("choices")):
            record.pop("choices", None)  # a column of the same name, of which nothing is read
        return record

    def _string(self, row: Mapping[str, Any], field: str, where: str) -> str:
        name = self.names[field]
        value = row.get(name)
        if not isinstance(value, str):
            given = type(value).__name__ if name in row else "no such field"
            raise DataError(f"{where}: `{name}` must be a string, got {given} (fields: {sorted(map(str, row))})")
        return _encodable(value, f"{where}: `{name}`")

    def _parsed(self, row: Mapping[str, Any], field: str) -> Any:
        """A field that need not be a string: a cell of a table may hold it as JSON."""
        value = row.get(self.names.get(field, ""))
        if isinstance(value, str) and field in ("messages", "choices", "answer_index"):
            with suppress(json.JSONDecodeError):
                return json.loads(value)
        return value

    def _taught(self, row: Mapping[str, Any], field: str, where: str) -> str:
        value = self._string(row, field, where)
        if not value.strip():
            raise DataError(f"{where}: `{self.names[field]}` is empty; there is nothing to learn or to score")
        return value

    def _messages(self, row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        name = self.names["messages"]
        given = self._parsed(row, "messages")
        if not isinstance(given, list) or not given or not all(isinstance(turn, dict) for turn in given):
            raise DataError(f"{where}: `{name}` must be a list of {{role, content}}, got {_short(given)}")
        messages = []
        for number, turn in enumerate(given):
            # Tables give every turn the columns of all.
            turn = {key: value for key, value in turn.items() if value is not None}
            for part in ("role", "content"):
                value = turn.get(part, "" if part == "content" and turn.get("tool_calls") else None)
                if not isinstance(value, str):
                    raise DataError(f"{where}: `{name}[{number}].{part}` must be a string, got {_short(value)}")
                turn[part] = _encodable(value, f"{where}: `{name}[{number}].{part}`")
            messages.append(turn)
        said = (turn["content"].strip() or turn.get("tool_calls") for turn in messages if turn["role"] == ASSISTANT)
        if not any(said):
            roles = ", ".join(dict.fromkeys(turn["role"] for turn in messages))
            raise DataError(
                f"{where}: `{name}` has no turn of the role {ASSISTANT!r} with content (roles: {roles}); there is "
                "nothing to learn"
            )
        return messages


def _is_words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _check_eval(record: Record, where: str) -> None:
    choices, index = record.get("choices"), record.get("answer_index")
    if "answer" in record:
        _encodable(str(record["answer"]), f"{where}: `answer`")
    if choices is None:
        return
    # A bool is an int to Python, and no index to anybody.
    if type(index) is not int or not isinstance(choices, list) or not 0 <= index < len(choices):
        raise DataError(
            f"{where}: a record with `choices` needs a list and an `answer_index` into it, "
            f"got choices={choices!r}, answer_index={index!r}"
        )
    for number, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice:
            raise DataError(f"{where}: `choices` must be strings that are not empty, got {choice!r} at {number}")
        _encodable(choice, f"{where}: `choices[{number}]`")
    if record.get("answer") is None:
        raise DataError(f"{where}: a record with `choices` needs its `answer` too, as it stands in the response")


def _encodable(text: str, what: str) -> str:
    """`text` itself, if it can be written as UTF-8: JSON can hold half of a pair of surrogates, as a cut emoji."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}: half of a "
            "character, as a text that was cut has. Mend the text, or leave the record out"
        ) from error
    return text


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(map(str, columns)) or "none"


def _short(value: object) -> str:
    shown = "nothing" if value is None else f"{type(value).__name__} {value!r}"
    return shown if len(shown) <= 80 else shown[:79] + "…"
