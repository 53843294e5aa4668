"""Records of a domain's evaluation with choices, as a task of EleutherAI's lm-evaluation-harness.

Prompt, mark of the answer and choices are those of `sparse_cl.four_domains.evaluate.accuracy`, which is the harness's
`acc_bytes` of them. The harness calls what is here; its `--metadata` says where the data lie.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

from sparse_cl.four_domains.evaluate import choice_continuations


def records(*, domain: str, source: str, data: str = "", **others: Any) -> dict[str, datasets.Dataset]:
    """The records of one source, all as the split "test".

    Args:
        domain: of the file "DOMAIN.eval.jsonl".
        source: of the records; others are left out.
        data: folder of the file, by `--metadata '{"data": "FOLDER"}'`.
        others: what the harness passes besides.

    Raises:
        ValueError: no folder is named, or the file has no such record.
    """
    if not data:
        raise ValueError('data: no folder is named; add --metadata \'{"data": "FOLDER"}\'')
    path = Path(data) / f"{domain}.eval.jsonl"
    read = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    found = [record for record in read if record.get("source") == source and record.get("choices")]
    if not found:
        raise ValueError(f"data: {path} has no record of {source!r} with choices")
    columns = ("prompt", "response", "choices", "answer", "answer_index")
    return {"test": datasets.Dataset.from_list([{column: record[column] for column in columns} for record in found])}


def given(record: dict[str, Any]) -> str:
    """What a choice follows: the prompt, a line break, and the mark of the answer."""
    return f"{record['prompt']}\n{choice_continuations(record)[0]}"


def continuations(record: dict[str, Any]) -> list[str]:
    """The choices, each in the form of the record's response."""
    return choice_continuations(record)[1]
