"""`python -m benchmarks.arena scale`, from the command line to the reports."""

import json

import pytest
from transformers import LlamaForCausalLM

from benchmarks.arena.__main__ import main
from benchmarks.arena.studies.scale import names_of


@pytest.fixture
def models(tiny_llama, tokenizer, tmp_path):
    """Folders of two models, of width 16 and 32."""
    tiny_llama.save_pretrained(tmp_path / "model")
    tiny_llama.config.intermediate_size, tiny_llama.config.hidden_size = 48, 32
    LlamaForCausalLM(tiny_llama.config).save_pretrained(tmp_path / "wide")
    for name in ("model", "wide"):
        tokenizer.save_pretrained(tmp_path / name)
    return [str(tmp_path / name) for name in ("model", "wide")]


@pytest.fixture
def data(tmp_path):
    """Two domains of 24 records with words of their own."""
    folder = tmp_path / "data"
    folder.mkdir()
    for domain, words in (("code", "def return if else"), ("math", "one plus two is three")):
        picked = [words.split()[(i * 7 + i // 3) % len(words.split())] for i in range(40)]
        for split in ("train", "test"):
            records = [{"prompt": picked[i], "response": " ".join(picked[i + 1 : i + 6])} for i in range(24)]
            (folder / f"{domain}.{split}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    return str(folder)


def test_a_family_is_compared_by_width(models, data, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--data", data, "--domains", "code,math", "--batch-size", "4", "--max-length", "64"]
    arguments += ["--probes", "activation,gradients", "--out", str(out)]
    assert main(["scale", "--model", *models, *arguments]) == 0
    told = capsys.readouterr().out
    record = json.loads((out / "results.json").read_text())
    assert [(model["model"], model["width"]) for model in record["models"]] == [("model", 16), ("wide", 32)]
    assert "Of 2 models from width 16 to 32" in told and "model/report.html" in (out / "report.html").read_text()
    for name in ("model", "wide"):
        own = json.loads((out / name / "results.json").read_text())
        assert own["model"] == name and (out / name / "report.html").is_file()
    assert main(["scale", *arguments]) == 2
    assert "--model: expected at least one, got none" in capsys.readouterr().err


def test_models_of_one_name_are_told_apart():
    assert names_of(["a/small", "b/small", "large"]) == ["small-1", "small-2", "large"]
