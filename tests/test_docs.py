"""Every snippet of the README and the guide works by itself, as a reader would paste it."""

from __future__ import annotations

import json
import re

import pytest
from cases.snippets import PAGES, ROOT, commands, run_alone, snippets

from sparse_cl import cli
from sparse_cl.four_domains import embedded_model

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def environment(tmp_path_factory, tokenizer):
    """Of a process that runs a snippet. A tiny model stands for the embedded one, which takes long to pretrain."""
    cache = tmp_path_factory.mktemp("cache")

    def tiny(folder, recipe):
        import transformers

        sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSE_CL_CACHE", str(cache))
        patch.setattr(embedded_model, "_pretrain", tiny)
        embedded_model.embedded_model_folder()
    return {"SPARSE_CL_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("snippet", snippets("python"), ids=str)
def test_a_python_snippet_runs_alone(snippet, tmp_path, environment):
    code, printed = run_alone(snippet, tmp_path, environment)
    assert code == 0, f"{snippet.place}: exit {code}\n{printed}"


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """A folder with what the README says of one's own data: its records, and a model in place of the named one."""
    monkeypatch.chdir(tmp_path)
    train, evaluated = ([json.loads(line) for line in block.text.splitlines()] for block in snippets("json")[:2])
    (tmp_path / "data").mkdir()
    for domain in ("support", "law"):
        for split, records in (("train", train * 4), ("test", train), ("eval", evaluated)):
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (tmp_path / "data" / f"{domain}.{split}.jsonl").write_text(lines)
        (tmp_path / f"{domain}.jsonl").write_text((tmp_path / "data" / f"{domain}.train.jsonl").read_text())
    return tmp_path


def replaced(arguments, **values):
    """Arguments with other values of some options, which are added where there are none."""
    arguments = list(arguments)
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if flag in arguments:
            arguments[arguments.index(flag) + 1] = str(value)
        else:
            arguments += [flag, str(value)]
    return arguments


def readme(command):
    """The arguments of each call of a command in the README."""
    return [words for place, words in commands("sparse-cl") if place.startswith("README.md") and words[0] == command]


def test_the_readmes_calls_of_learn_go_on_from_each_other(own_data, environment, monkeypatch):
    monkeypatch.setenv("SPARSE_CL_CACHE", environment["SPARSE_CL_CACHE"])
    (cached,) = (own_data / environment["SPARSE_CL_CACHE"]).iterdir()
    first, second = (replaced(words, steps=1, max_length=64, texts=2) for words in readme("learn"))
    assert cli.main(replaced(first, model=cached)) == 0
    assert cli.main(second) == 0
    history = json.loads((own_data / "models" / "2-law" / "sparse_cl" / "history.json").read_text())
    assert [entry["name"] for entry in history["domains"]] == ["1-support", "2-law"]


def test_the_readmes_command_learns_from_files_of_its_format(own_data, environment, monkeypatch, capsys):
    monkeypatch.setenv("SPARSE_CL_CACHE", environment["SPARSE_CL_CACHE"])
    (cached,) = (own_data / environment["SPARSE_CL_CACHE"]).iterdir()
    (arguments,) = readme("run")
    arguments = replaced(arguments, model=cached, steps=1, batch_size=2, max_length=64)
    assert cli.main(arguments) == 0
    out = own_data / "out" / "run"
    assert "elastic" in (out / "comparison.txt").read_text()
    for folder in ("1-support", "2-law"):
        assert (out / "elastic" / folder / "model.safetensors").is_file()
    scores = json.loads((out / "results.json").read_text())["runs"][0]["R"]
    assert all(score is not None for metric in scores.values() for score in metric[-1])


@pytest.mark.parametrize("command", commands("sparse-cl"), ids=lambda command: f"{command[0]} {command[1][0]}")
def test_a_command_is_accepted(command, own_data, environment, monkeypatch, capsys):
    """All is checked before anything is written, and that its --out is a file is what stops it."""
    monkeypatch.setenv("SPARSE_CL_CACHE", environment["SPARSE_CL_CACHE"])
    (cached,) = (own_data / environment["SPARSE_CL_CACHE"]).iterdir()
    arguments = command[1]
    if arguments[0] == "plan":
        assert cli.main(replaced(arguments, model=cached, method="adamw")) == 0  # others take seconds each
        return
    (own_data / "taken").touch()
    assert cli.main(replaced(arguments, out=own_data / "taken")) == 2
    assert "is a file; --out must be a folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", commands("python -m benchmarks.arena"), ids=lambda command: command[1][0])
def test_a_command_of_the_arena_is_accepted(command, own_data, monkeypatch, capsys):
    from benchmarks.arena.__main__ import main

    assert main(replaced(command[1], data="./absent") if "--data" in command[1] else command[1]) == 2
    error = capsys.readouterr().err
    assert "usage:" not in error
    assert "no such folder" in error or "no results.json" in error


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 200
    assert len(README.split()) <= 1800
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", text):
            assert not target or target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def anchors(page):
    """Names of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_to_headings_lead_to_headings():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]*)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert anchor in anchors(page.parent / target if target else page), f"{page.name}: {target}#{anchor}"
