"""`run`, `probe` and `drift` take the same data, show it, and refuse it before a model is loaded."""

from __future__ import annotations

import copy
import json
import sys

import pytest

from sparse_cl.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """A folder with a tokenizer and a configuration, and no weights."""
    import transformers

    folder = tmp_path_factory.mktemp("model")
    transformers.LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def questions(tmp_path):
    """One domain in a table, whose columns have other names."""
    path = tmp_path / "support.csv"
    path.write_text("question,answer\n" + "".join(f"{n} plus one?,three {n}\n" for n in range(40)))
    return str(path)


def command(name, model, data, out, *more):
    models = {"run": ["--model", model, "--method", "adamw"], "probe": ["--model", model], "drift": [model, model]}
    return main([name, *map(str, models[name]), "--data", data, "--out", str(out), "--max-length", "64", *more])


@pytest.mark.parametrize("name", ["run", "probe", "drift"])
def test_data_is_shown_and_nothing_else_is_done(name, model, questions, tmp_path, capsys):
    columns = ("--columns", "prompt=question,response=answer", "--show-data")
    assert command(name, model, questions, tmp_path / "out", *columns) == 0
    told = capsys.readouterr().out
    assert told.startswith(
        f"support: 40 records (prompt/response) from {questions}; a hash of their content holds out 2"
    )
    assert told.count("of them (in «») are learned") == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["run", "probe", "drift"])
def test_wrong_data_is_said_before_anything_heavy_is_imported(name, model, questions, tmp_path, capsys, monkeypatch):
    for heavy in ("four_domains.experiment", "models.loading", "report.probe_study", "report.drift"):
        monkeypatch.setitem(sys.modules, f"sparse_cl.{heavy}", None)
    assert command(name, model, questions, tmp_path / "out") == 2
    assert "support.csv: no format has these columns: question, answer." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["run", "probe", "drift"])
@pytest.mark.parametrize("fault", ["record", "padding"])
def test_tokens_without_rows_are_said_before_the_weights_are_read(
    name, fault, model, questions, tokenizer, tmp_path, capsys
):
    own = copy.deepcopy(tokenizer)
    if fault == "record":
        own.add_tokens(["three"])
    else:
        own.add_special_tokens({"pad_token": "<my_pad>"})
    folder = tmp_path / "wrong"
    own.save_pretrained(folder)
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    out, columns = tmp_path / "out", ("--columns", "prompt=question,response=answer")
    assert command(name, folder, questions, out, *columns) == 2  # the folder has no weights that could be read
    rows, err = json.loads((model / "config.json").read_text())["vocab_size"], capsys.readouterr().err
    assert f"token {rows} (" in err and f"the embedding has {rows} rows" in err
    assert ("support.csv:" in err) == (fault == "record")
    assert not out.exists()


def test_a_run_on_one_file_needs_no_name(tiny_llama, tokenizer, questions, tmp_path, capsys, monkeypatch):
    from sparse_cl.four_domains import experiment

    monkeypatch.setattr(experiment, "draw_all", lambda runs, out: None)
    for part in (tiny_llama, tokenizer):
        part.save_pretrained(tmp_path / "model")
    more = ("--columns", "prompt=question,response=answer", "--steps", "2", "--batch-size", "2")
    assert command("run", tmp_path / "model", questions, tmp_path / "out", *more) == 0
    assert "support: 40 records (prompt/response)" in capsys.readouterr().err
    (run,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert run["domains"] == ["support"]
    assert command("run", tmp_path / "model", questions, tmp_path / "out", *more) == 0, "it is finished"
    assert command("run", tmp_path / "model", questions, tmp_path / "out", *more[2:]) == 2
    assert "holds another run (it differs in columns" in capsys.readouterr().err


def test_a_run_on_conversations_and_texts(tiny_llama, tokenizer, tmp_path, monkeypatch):
    from sparse_cl.four_domains import experiment

    monkeypatch.setattr(experiment, "draw_all", lambda runs, out: None)
    for part in (tiny_llama, tokenizer):
        part.save_pretrained(tmp_path / "model")
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]
    chats = [{"messages": [{**turns[0], "content": f"{n}?"}, turns[1]]} for n in range(8)]
    for name, rows in {"chat": chats, "book": [{"text": f"once upon a time {n}"} for n in range(8)]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    domains = f"chat={tmp_path / 'chat.jsonl'},book={tmp_path / 'book.jsonl'}"
    arguments = ["run", "--model", str(tmp_path / "model"), "--domains", domains, "--method", "adamw", "--steps", "2"]
    assert main([*arguments, "--batch-size", "2", "--max-length", "32", "--out", str(tmp_path / "out")]) == 0
    (run,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert run["domains"] == ["chat", "book"]
    assert all(0 < score < 100 for row in run["R"]["bits_per_byte"] for score in row)
