from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from sparse_cl.data import DataError
from sparse_cl.data.reading import read_files
from sparse_cl.four_domains.domains import DEFAULT_DOMAINS, default_domains, load_domains, name_of, read_folder

LINE = {"prompt": "p", "response": "r"}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "code.train.jsonl", [{"prompt": f"p{i}", "response": "r"} for i in range(60)])
    write(tmp_path / "code.test.jsonl", [LINE])
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p"', r"bad.jsonl:3: not a line of JSON"),
        ('["p", "r"]', r"bad.jsonl:3: expected an object .* got list"),
        ('{"prompt": "p"}', r"bad.jsonl:3: `response` must be a string, got no such field \(fields: \['prompt'\]\)"),
        ('{"prompt": 3, "response": "r"}', r"bad.jsonl:3: `prompt` must be a string, got int"),
        ('{"prompt": "p", "response": ""}', r"bad.jsonl:3: `response` is empty"),
        ('{"prompt": "p", "response": " "}', r"bad.jsonl:3: `response` is empty"),
        ('{"prompt": "p", "response": "r", "choices": ["a"], "answer_index": 1}', r"bad.jsonl:3: .*`answer_index`"),
        (
            '{"prompt": "p", "response": "r", "choices": ["a"], "answer_index": 0}',
            r"jsonl:3: .* needs its `answer`",
        ),
        ('{"prompt": "p", "response": "r", "choices": ["a", 2], "answer_index": 0}', "jsonl:3: .* got 2 at 1"),
        ('{"prompt": "p", "response": "r", "choices": ["", "b"], "answer_index": 1}', "jsonl:3: .* got '' at 0"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(LINE) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_files([path], for_eval=True)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_domain_is_an_error(folder, content):
    (folder / "code.test.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"code\.test\.jsonl: holds no record"):
        read_folder(folder, "code")


def test_validation_is_held_out_of_training(folder):
    domain = read_folder(folder, "code")
    assert [r["prompt"] for r in domain.train + domain.validation] == [f"p{i}" for i in range(60)]
    assert len(domain.validation) == 3
    assert domain.eval == []


def test_too_little_to_hold_out_is_an_error(folder):
    write(folder / "code.train.jsonl", [LINE])
    with pytest.raises(DataError, match="at least 2"):
        read_folder(folder, "code")


@pytest.mark.parametrize(
    ("names", "data", "message"),
    [
        (["law"], None, "unknown embedded domain 'law'; there are code, math, medical, general"),
        (["code", "code"], None, "given twice"),
        ([], None, "no domain given"),
        (["../code"], None, "a name is letters"),
        (["code"], "./nowhere", "no such folder or file"),
    ],
)
def test_names_that_cannot_be_used(names, data, message):
    with pytest.raises(DataError, match=message):
        load_domains(names, data, 0)


def test_an_absent_domain_names_those_that_are_there(folder):
    with pytest.raises(DataError, match=r"'law': no file .*law\.train\.jsonl .* in this folder: code"):
        load_domains(["law"], str(folder), 0)


def test_a_folder_as_one_domain(tmp_path):
    dataset = tmp_path / "mine"
    dataset.mkdir()
    write(dataset / "train.jsonl", [{"prompt": f"p{i}", "response": "r"} for i in range(40)])
    write(dataset / "test.jsonl", [{"prompt": "t", "response": "r"}])
    (domain,) = load_domains([f"law={dataset}"], None, 0)
    assert (domain.name, len(domain.train), len(domain.validation)) == ("law", 38, 2)
    assert domain.test == [{"prompt": "t", "response": "r"}]


def test_other_columns_are_named_with_what_to_give(tmp_path):
    dataset = tmp_path / "mine"
    dataset.mkdir()
    for split in ("train", "test"):
        write(dataset / f"{split}.jsonl", [{"question": "p", "answer": "r"}])
    with pytest.raises(DataError, match=r"no format has these columns: question, answer\. .* --columns prompt=COLUMN"):
        load_domains([f"law={dataset}"], None, 0)


def test_a_data_set_that_does_not_load(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="absent: no such folder or file"):
        load_domains([f"law={tmp_path / 'absent'}"], None, 0)

    def refuse(*arguments):
        raise RuntimeError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=refuse))
    with pytest.raises(DataError, match="domain 'law': cannot load data set absent, .*: no network"):
        load_domains(["law=absent"], None, 0)


def test_the_real_data_is_read(shared_folder):
    domains = load_domains(["code", "math", "medical", "general"], str(shared_folder / "data"), 0)
    for domain in domains:
        held_out = {record["prompt"] for record in domain.test + domain.eval}
        assert len(domain.train) > 1000
        assert not held_out & {record["prompt"] for record in domain.train}


def test_a_file_that_is_not_utf_8_is_named_with_its_line_and_a_byte_order_mark_is_none(tmp_path):
    path = tmp_path / "bad.jsonl"
    line = json.dumps({"prompt": "né", "response": "r"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    assert list(read_files([path])) == [{"prompt": "né", "response": "r"}]
    path.write_bytes(line.encode() + b"\n" + line.encode("latin-1"))
    with pytest.raises(DataError, match=r"bad\.jsonl:2: not UTF-8: .* 0xe9"):
        list(read_files([path]))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("my code.jsonl", "my-code"),
        ("support.train.jsonl", "support"),
        ("train.jsonl", "clinic"),
        ("a*.jsonl", "a"),
        ("*.jsonl", "clinic"),
        ("", "clinic"),
    ],
)
def test_one_domain_is_named_after_its_file(tmp_path, file, name):
    folder = tmp_path / "clinic"
    folder.mkdir()
    lines = [{"prompt": f"p{number}", "response": "r"} for number in range(100)]
    write(folder / (file.replace("*", "b") or "notes.jsonl"), lines)
    data = str(folder / file)
    assert default_domains(data) == (name,)
    (domain,) = load_domains(default_domains(data), data, 0)
    assert (domain.name, len(domain.train), len(domain.validation), len(domain.test)) == (name, 91, 4, 5)
    told = "a hash of their content holds out 5 to be scored and 4 as validation"
    assert domain.origin.startswith(f"{name}: 100 records (prompt/response) from {folder}")
    assert domain.origin.endswith(told)
    splits = [{record["prompt"] for record in part} for part in domain.splits().values()]
    assert len(set.union(*splits)) == 100
    (again,) = load_domains(["other"], data, 3)
    assert again.splits() == domain.splits(), (
        "whatever the seed and the name of a run: its scores are of the same records"
    )


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_files_of_the_other_splits_beside_a_file_are_its_domains(folder, suffix):
    write(folder / "code.eval.jsonl", [{**LINE, "answer": "r"}])
    (folder / "code.validation.csv").write_text("prompt,response\nv,r\n")
    domain = read_folder(folder, "code")
    assert (len(domain.train), domain.validation) == (60, [{"prompt": "v", "response": "r"}])
    assert (domain.test, domain.eval) == ([LINE], [{**LINE, "answer": "r"}])
    own = folder / f"mine.{suffix}"
    own.write_text('{"prompt": "m", "response": "r"}\n' * 2 if suffix == "jsonl" else "prompt,response\nm,r\nm,r\n")
    write(folder / "mine.test.jsonl", [LINE])
    for name, source in (("code", folder / "code.train.jsonl"), ("mine", own)):
        (found,) = load_domains([name], str(source), 0)
        assert found.test == [LINE], name
    (from_elsewhere,) = load_domains([f"code={folder / 'code.train.jsonl'}"], None, 0)
    assert from_elsewhere == replace(domain, origin=from_elsewhere.origin)


def test_several_domains_of_a_folder_must_be_put_in_order(folder):
    assert default_domains(str(folder)) == ("code",)
    write(folder / "law.train.jsonl", [LINE] * 2)
    with pytest.raises(DataError, match="has several domains; .* --domains code,law"):
        default_domains(str(folder))
    for name in DEFAULT_DOMAINS:
        write(folder / f"{name}.train.jsonl", [LINE] * 2)
    assert default_domains(str(folder)) == default_domains(None) == DEFAULT_DOMAINS


def test_a_folder_in_the_home_is_the_same_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    write(folder / "law.train.jsonl", [LINE] * 2)
    home = f"~/{folder.name}"
    with pytest.raises(DataError, match="has several domains"):
        default_domains(home)
    assert load_domains(["code"], home, 0) == load_domains(["code"], str(folder), 0)
    assert name_of(home) == name_of(str(folder))


def test_two_files_of_one_split_are_refused(folder):
    (folder / "code.train.csv").write_text("prompt,response\np,r\n")
    with pytest.raises(DataError, match=r"code\.train\.jsonl and code\.train\.csv are the same split"):
        read_folder(folder, "code")


def test_several_names_for_one_file_are_refused(folder):
    with pytest.raises(DataError, match="is one domain, and 2 are named; give a folder, or NAME=FILE each"):
        load_domains(["a", "b"], str(folder / "code.train.jsonl"), 0)


def test_columns_are_renamed_in_every_split(folder):
    for split in ("train", "test"):
        write(folder / f"law.{split}.jsonl", [{"question": f"q{n}", "answer": "a"} for n in range(2)])
    (domain,) = load_domains(["law"], str(folder), 0, ("prompt=question", "response=answer"))
    assert domain.test == [{"prompt": f"q{n}", "response": "a"} for n in range(2)]


def test_a_data_set_of_the_hub_by_itself_is_named_after_it(monkeypatch):
    asked = hub(monkeypatch, train=[{**LINE, "prompt": str(number)} for number in range(3)])
    assert default_domains("owner/laws:small") == default_domains("owner/laws") == ("laws",)
    (domain,) = load_domains(["laws"], "owner/laws:small", 0)
    load_domains(["laws"], "owner/laws", 0)
    assert asked == [("owner/laws", "small"), ("owner/laws", None)]
    assert [len(part) for part in domain.splits().values()] == [1, 1, 1, 0]


def hub(monkeypatch, **splits):
    """Puts a package `datasets` in place that gives these splits, and notes what was asked for."""
    asked = []
    package = SimpleNamespace(load_dataset=lambda *arguments: asked.append(arguments) or splits)
    monkeypatch.setitem(sys.modules, "datasets", package)
    return asked


def test_a_data_set_of_the_hub(monkeypatch):
    rows = [{"prompt": f"p{i}", "response": "r", "answer": None} for i in range(40)]
    choices = {**LINE, "choices": ["r", "s"], "answer": "r", "answer_index": 0}
    asked = hub(monkeypatch, train=rows, test=[LINE], eval=[choices], other=[{"text": "not read"}])
    (own,) = load_domains(["law=owner/laws:small"], None, 0)
    assert (own.name, own.test, own.eval) == ("law", [LINE], [choices])
    assert own.train + own.validation == [{"prompt": f"p{i}", "response": "r"} for i in range(40)]
    assert len(own.validation) == 2, "5 % are held out"
    hub(monkeypatch, train=rows, validation=[LINE], test=[LINE])
    (given,) = load_domains(["law"], "owner/laws", 0)
    assert (len(given.train), given.validation, given.eval) == (40, [LINE], [])
    assert asked == [("owner/laws", "small")]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"test": [LINE], "other": [LINE]}, "domain 'law': data set laws has no split 'train'; it has test, other"),
        (
            {"train": [LINE] * 3},
            "domain 'law': data set laws: 3 training records, 1 of them different; need at least 2",
        ),
        ({"train": [], "test": [LINE]}, "data set laws, split 'train' holds no record"),
        ({"train": [LINE], "test": [LINE]}, "data set laws: 1 training record; need at least 2"),
        (
            {"train": [LINE] * 2, "test": [LINE, {"prompt": "p"}]},
            r"data set laws, test\[1\]: `response` must be a string",
        ),
        ({"train": [LINE] * 2, "test": [LINE], "eval": [{**LINE, "choices": ["r"]}]}, r"eval\[0\]: a record with"),
    ],
)
def test_a_data_set_of_the_hub_that_cannot_be_used(monkeypatch, splits, message):
    hub(monkeypatch, **splits)
    with pytest.raises(DataError, match=message):
        load_domains(["law=laws"], None, 0)


def test_without_the_package_datasets_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="domain 'law': data set laws .* is read .* datasets: pip install datasets"):
        load_domains(["law=laws"], None, 0)
