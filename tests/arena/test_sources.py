from __future__ import annotations

import json

import pytest

from benchmarks.arena.sources import HELD_OUT, SOURCES, write_sources
from sparse_cl.four_domains.domains import load_domains


def folder_of(path, counts):
    path.mkdir()
    rows = [
        {"prompt": f"{name} {number}\u2028", "response": "yes", "source": name}
        for number in range(max(counts.values()))
        for name, count in counts.items()
        if number < count
    ]
    for split, part in (("b", rows[::2]), ("a", rows[1::2])):
        (path / f"{split}.train.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in part))
    return path


def test_each_record_goes_to_its_source_once_and_the_last_are_held_out(tmp_path):
    counts = {name: HELD_OUT + 2 + place for place, name in enumerate(SOURCES)} | {"other": 3}
    data = folder_of(tmp_path / "data", counts)
    for out in ("one", "two"):
        write_sources(data, tmp_path / out)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    for domain in load_domains(SOURCES, str(tmp_path / "one"), 0):
        prompts = [record["prompt"] for record in [*domain.train, *domain.validation, *domain.test]]
        assert len(set(prompts)) == len(prompts) == counts[domain.name]
        assert len(domain.test) == HELD_OUT
        assert all(prompt.startswith(domain.name + " ") for prompt in prompts)


@pytest.mark.parametrize("short", [HELD_OUT, 0])
def test_a_source_with_too_few_records_is_refused_before_anything_is_written(tmp_path, short):
    counts = dict.fromkeys(SOURCES, HELD_OUT + 1) | {"svamp": short}
    data = folder_of(tmp_path / "data", counts)
    with pytest.raises(ValueError, match=f"has {short} training records of svamp; expected more than {HELD_OUT}"):
        write_sources(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_record_without_a_source_is_refused_by_its_place(tmp_path):
    (tmp_path / "a.train.jsonl").write_text('{"prompt": "p", "response": "r"}\n')
    with pytest.raises(ValueError, match=r"a.train.jsonl:1: expected a record with a source"):
        write_sources(tmp_path, tmp_path / "out")
