"""Every format in every kind of file gives the same records; what is wrong is named with its place."""

from __future__ import annotations

import csv
import json
import sys
from datetime import datetime
from types import SimpleNamespace

import pytest

from sparse_cl.data import SCORED, DataError, Records, parse_columns, read_records
from sparse_cl.data.records import Format

PAIR = {"prompt": 'What, is "two"\nplus two?', "response": "It is 4 – NA"}
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
#: Columns as people have them, and the record that they are.
FORMATS = {
    "prompt/response": (PAIR, PAIR),
    "prompt/completion": ({"prompt": "007", "completion": "NA"}, {"prompt": "007", "response": "NA"}),
    "messages": ({"messages": TURNS, "prompt": "left out"}, {"messages": TURNS}),
    "instruction/input/output": (
        {"instruction": "Add.", "input": "2, 2", "output": "4"},
        {"prompt": "Add.\n\n2, 2", "response": "4"},
    ),
    "text": ({"text": "Once upon a time.", "source": "a book"}, {"text": "Once upon a time."}),
}
KINDS = ("jsonl", "json", "lines.json", "csv", "tsv", "parquet")


def write(path, rows):
    """Writes rows as a file of the kind that its name says; what is no string becomes JSON in a table's cell."""
    if path.name.endswith((".jsonl", ".lines.json")):
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            for row in rows:
                table.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_in_every_kind_of_file(tmp_path, name, kind):
    row, record = FORMATS[name]
    read = read_records([write(tmp_path / f"mine.{kind}", [row] * 3)])
    assert list(read) == [record] * 3
    assert read.format == name
    assert read.describe() == f"3 records ({name}) from {tmp_path / f'mine.{kind}'}"
    assert len(set(read.where)) == 3
    assert read.fingerprint == read_records([write(tmp_path / "same.jsonl", [row] * 3)]).fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_says_where_it_stands(tmp_path, kind):
    path = write(tmp_path / f"mine.{kind}", [PAIR, {**PAIR, "prompt": "p"}])
    places = {"jsonl": ":3", "lines.json": ":3", "csv": ":4", "tsv": ":4"}
    assert read_records([path]).where[1] == path + places.get(kind, "[1]")


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_renamed(tmp_path, kind):
    path = write(tmp_path / f"mine.{kind}", [{"question": "q", "answer": "a", "text": "t", "prompt": "no"}])
    columns = parse_columns(["prompt=question", "response=answer"])
    (record,) = read_records([path], columns)
    assert record == {"prompt": "q", "response": "a"}, "a column that is a response is no answer besides"
    (record,) = read_records([path], {"text": "question"})
    assert record == {"text": "q"}


def test_the_column_of_an_alpaca_input_can_be_the_instruction(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"input": "2 + 2?", "output": "4"}])
    (record,) = read_records([path], {"instruction": "input"})
    assert record == {"prompt": "2 + 2?", "response": "4"}
    (tmp_path / "index.csv").write_text(",input,output\n7,2 + 2?,4\n")  # as pandas writes it
    assert read_records([str(tmp_path / "index.csv")], {"instruction": "input"}).records == [record]


def test_an_alpaca_record_without_an_input(tmp_path):
    rows = [{"instruction": "Sing.", "output": "la", "input": ""}, {"instruction": "Sing.", "output": "la"}]
    first, second = read_records([write(tmp_path / "a.jsonl", rows)])
    assert first == second == {"prompt": "Sing.", "response": "la"}


def test_choices_in_a_table(tmp_path):
    from sparse_cl.data.reading import read_files

    row = {**PAIR, "choices": ["a", "b"], "answer": "a", "answer_index": 0}
    for kind in KINDS:
        path = write(tmp_path / f"mine.{kind}", [row])
        (read,) = read_files([tmp_path / path], for_eval=True)
        assert read == row, kind


def test_several_sources_folders_and_globs(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two" / "below"
    one.mkdir()
    two.mkdir(parents=True)
    write(one / "b.jsonl", [{"text": "b"}])
    write(one / "a.csv", [{"prompt": "a", "response": "r"}])
    (one / "README.md").write_text("not data")
    write(two / "law.train.jsonl", [{"text": "train"}])
    write(two / "law.test.jsonl", [{"text": "test"}])
    write(tmp_path / "one.json", [{"text": "one"}])
    read = read_records([str(tmp_path / "two"), str(one), str(tmp_path / "*.json")])
    assert [record.get("text") for record in read] == ["train", None, "b", "one"]
    assert read.format == "text and prompt/response"
    assert read_records([str(tmp_path / "**" / "*.jsonl")]).where[0].startswith(str(one))


def test_hidden_files_and_other_splits_of_a_folder_are_left_out(tmp_path):
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "x.jsonl", [{"text": "hidden"}])
    write(tmp_path / "data.jsonl", [{"text": "mine"}])
    write(tmp_path / "valid-00000-of-00001.jsonl", [{"text": "held out"}])
    write(tmp_path / "test-driven.jsonl", [{"text": "mine too"}])
    assert [record["text"] for record in read_records([str(tmp_path)])] == ["mine", "mine too"]


MESSAGES = r"`messages` must be a list of \{role, content\}"
BAD = {
    "surrogate": (
        {"prompt": "p", "response": "cut \ud83d"},
        r"`response` has a lone surrogate \(U\+D83D\) at char.* 4",
    ),
    "surrogate of a turn": (
        {"messages": [*TURNS, {"role": "user", "content": "\udc00"}]},
        r"`messages\[2\].content` has a lone surrogate",
    ),
    "surrogate of a text": ({"text": "\ud83d"}, "`text` has a lone surrogate"),
    "surrogate of a choice": (
        {"prompt": "p", "response": "r", "choices": ["\ud83d"], "answer": "r", "answer_index": 0},
        r"`choices\[0\]` has a lone surrogate",
    ),
    "surrogate of an answer": ({"prompt": "p", "response": "r", "answer": "\ud83d"}, "`answer` has a lone surrogate"),
    "true": (
        {"prompt": "p", "response": "r", "choices": ["a", "b"], "answer": "a", "answer_index": True},
        ".* `answer_index` .* answer_index=True",
    ),
    "number": ({"text": 3}, "`text` must be a string, got int"),
    "empty": ({"text": " \n"}, "`text` is empty"),
    "empty output": ({"instruction": "i", "output": ""}, "`output` is empty"),
    "null": ({"prompt": None, "response": "r"}, "`prompt` must be a string, got NoneType"),
    "no list": ({"messages": "hi"}, f"{MESSAGES}, got str 'hi'"),
    "no turn": ({"messages": []}, MESSAGES),
    "no role": ({"messages": [{"content": "a"}]}, r"`messages\[0\].role` must be a string, got nothing"),
    "parts": (
        {"messages": [{"role": "assistant", "content": [{"type": "text"}]}]},
        r"`messages\[0\].content` must be a string, got list",
    ),
    "nobody answers": ({"messages": TURNS[:1]}, r"`messages` has no turn of the role 'assistant' .*\(roles: user\)"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_wrong_with_a_record_is_named_with_file_line_and_field(tmp_path, fault):
    from sparse_cl.data.reading import read_files

    row, message = BAD[fault]
    good = next(
        good for good, _ in FORMATS.values() if set(good) >= set(row) & {"text", "messages", "output", "response"}
    )
    path = write(tmp_path / "bad.jsonl", [good, row])
    with pytest.raises(DataError, match=r"bad\.jsonl:3: " + message):
        read_files([tmp_path / path], for_eval=True)


FILES = {
    "a.jsonl": ('{"text": "a"}\n{"text": ', r"a\.jsonl:2: not a line of JSON"),
    "a.json": ('[{"text": "a"},\n {"text": ]', r"a\.json:2: not JSON"),
    "b.json": ('[{"text": "a"}, "b"]', r"b\.json\[1\]: expected a list of objects, got str"),
    "c.json": ('{"text": "a"}\n{"text": ', r"c\.json:2: not a line of JSON"),
    "a.csv": ('text,other\na,b\n"c\n",d,e\n', r"a\.csv:3: more cells than the header has columns \(2\)"),
    "b.csv": ('text\n"a"b\n', r"b\.csv:2: not CSV"),
    "c.csv": ("text\n", r"c\.csv: holds no record"),
    "d.csv": (b"text\na\n\xe9\n", r"d\.csv:\d: not UTF-8"),
    "d.json": (b'["\xe9"]', r"d\.json: not UTF-8"),
    "e.jsonl": ("", r"e\.jsonl: holds no record"),
    "a.txt": ("a", r"a\.txt: expected a file of \.jsonl, \.json, \.csv"),
    "f.jsonl": (
        '{"q": "a", "a": "b"}',
        r"f\.jsonl: no format has these columns: q, a\. Expected .* --columns prompt=COL",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_read(tmp_path, name):
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_records([str(tmp_path / name)])


def test_a_file_that_is_no_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_text("text")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
        read_records([str(tmp_path / "a.parquet")])


@pytest.mark.parametrize(
    ("sources", "columns", "message"),
    [
        ([], None, "no data given"),
        (["./absent.jsonl"], None, r"absent\.jsonl: no such folder or file"),
        (["absent.csv"], None, r"absent\.csv: no such folder or file"),
        (["./*.absent"], None, "no file matches"),
        (["{folder}"], None, "the folder holds no data; expected files of .jsonl"),
        (["{folder}/a.jsonl"], {"prompt": "q"}, r"a\.jsonl: columns prompt=q: there is no such column; there are text"),
        (["{folder}/a.jsonl"], {"response": "text"}, "no format has these columns: text"),
        (["{folder}/a.jsonl"], {"question": "text"}, "columns: no format has a field 'question'; there are prompt, "),
    ],
)
def test_sources_that_cannot_be_read(tmp_path, sources, columns, message):
    folder = tmp_path / "folder"
    folder.mkdir()
    if "{folder}" not in sources:
        write(folder / "a.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=message):
        read_records([source.format(folder=folder) for source in sources], columns)


def test_records_to_score_by_are_those_of_a_test(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [{"text": split}])
    write(tmp_path / "law.jsonl", [{"text": "law"}])
    assert [record["text"] for record in read_records([str(tmp_path)], splits=SCORED)] == ["test"]
    learned = read_records([str(tmp_path)])
    assert [record["text"] for record in learned] == ["train"]
    assert "without " in learned.describe() and "law.jsonl, whose name says no split" in learned.describe()


@pytest.mark.parametrize(
    "choices", [[{"label": "a", "text": "b"}], [1, 2], 4, {"text": ["a"]}, "many", datetime(2026, 1, 1)]
)
def test_a_column_that_only_an_evaluation_reads_may_hold_anything(tmp_path, choices):
    form = Format(["prompt", "response", "choices", "answer"], {}, "file")
    record = form.record({**PAIR, "choices": choices, "answer": datetime(2026, 1, 1)}, "file:1")
    assert "choices" not in record
    assert Records([record], form.name, "file").fingerprint and record.content()


def test_a_folder_of_tests_alone(tmp_path):
    write(tmp_path / "a.test.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"has no training file, only test: .*a\.test\.jsonl"):
        read_records([str(tmp_path)])


def test_one_string_is_no_list_of_sources(tmp_path):
    with pytest.raises(TypeError, match="sources must be a list of sources"):
        read_records("a.jsonl")


@pytest.mark.parametrize("entry", ["prompt", "prompt=", "=question", "prompt=a prompt=b"])
def test_columns_that_cannot_be_parsed(entry):
    with pytest.raises(DataError, match="--columns .*expected FIELD=COLUMN|no format has a field ''"):
        parse_columns(entry.split())


def test_a_data_set_of_the_hub(monkeypatch):
    asked = []
    rows = [{"messages": [{**turn, "tool_calls": None} for turn in TURNS], "prompt": None}]
    package = SimpleNamespace(load_dataset=lambda *arguments: asked.append(arguments) or {"train_sft": rows})
    monkeypatch.setitem(sys.modules, "datasets", package)
    read = read_records(["owner/chats:small"])
    assert list(read) == [{"messages": TURNS}]
    assert asked == [("owner/chats", "small")]
    assert read.describe() == "1 record (messages) from data set owner/chats (small)"


@pytest.mark.parametrize(("package", "source"), [("pyarrow", "a.parquet"), ("datasets", "owner/set")])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, package, source):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"{source}.* by the package {package}: pip install {package}"):
        read_records([source])


def test_tables_are_read_without_the_package_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for kind in KINDS:
        assert len(read_records([write(tmp_path / f"mine.{kind}", [PAIR])])) == 1
