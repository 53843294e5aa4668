"""`sparse-cl plan` from arguments to text and JSON."""

from __future__ import annotations

import argparse
import json
import re

import pytest
import transformers

from sparse_cl.planner.command import add_parser

METHODS = "adamw,lora,sparse-masked"


@pytest.fixture
def folder(tmp_path):
    transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    ).save_pretrained(tmp_path)
    return tmp_path


def plan(*arguments):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(required=True))
    chosen = parser.parse_args(["plan", *map(str, arguments)])
    chosen.command(chosen)


def rows(text):
    """First cell → the others, of every row of a table; tables are continued below where there are many methods."""
    found = {}
    for line in text.splitlines():
        first, *others = re.split(r"\s{2,}", line)
        found.setdefault(first, []).extend(others)
    return {first: cells for first, cells in found.items() if len(cells) == len(METHODS.split(","))}


def test_the_table_says_what_the_file_says(folder, capsys):
    chosen = ["--method", METHODS, "--gpu", "a100", "--tokens", "20M", "--domains", 1]
    plan("--model", folder, *chosen, "--json", folder / "plan.json")
    text = capsys.readouterr().out
    written = json.loads((folder / "plan.json").read_text())
    assert written["run"]["tokens"] == 20e6 and written["device"]["name"] == "a100"
    assert list(written["methods"]) == METHODS.split(",") and written["not_planned"] == {}
    shown = rows(text)
    entries = written["methods"].values()
    assert shown["peak"] == [f"{entry['memory']['peak'] / 1e9:.3g}" for entry in entries]
    assert shown["steps"] == [str(entry["steps"]) for entry in entries]
    both = [entry["dollars"] + entry["probe_dollars"] for entry in entries]
    assert shown["both: dollars"] == [f"{dollars:.3g}" for dollars in both]
    for entry, cell in zip(entries, shown["training: device hours"], strict=True):
        assert float(cell) == pytest.approx(entry["steps"] * entry["step_seconds"] / 3600, rel=0.01)


def test_several_numbers_of_gpus_stand_side_by_side(folder, capsys):
    chosen = ["--method", "adamw", "--domains", 1, "--gpus", "1,2", "--json", folder / "plan.json"]
    plan("--model", folder, *chosen)
    text = capsys.readouterr().out
    one, two = json.loads((folder / "plan.json").read_text())["methods"].values()
    assert (one["gpus"], two["gpus"]) == (1, 2)
    assert "adamw on 1  adamw on 2" in text and "adamw on 2: fits 2 devices." in text
    assert "A GPU sends 450 GB/s among 2 (NVIDIA DGX H100" in text
    assert f"{two['sent_bytes'] / 1e9:.3g}" in text and one["sent_bytes"] == 0


def test_assumptions_come_first_and_name_every_number_that_was_chosen(folder, capsys):
    plan(
        "--model",
        folder,
        "--domains",
        1,
        "--method",
        "lora,orthogonal",
        "--rank",
        4,
        "--max-rank",
        3,
        "--mfu",
        0.31,
        "--price",
        2.5,
    )
    text = capsys.readouterr().out
    assumptions = text[: text.index("Memory in GB")]
    for said in (
        "products of matrices reach 31% of that peak",
        "2.5 dollars an hour",
        "lora rank 4",
        "max_rank 3",
        "own code",
        "20 M tokens",
    ):
        assert said in assumptions
    assert "Left out:" in assumptions


def test_a_configuration_of_quantized_weights_is_said_to_be_one(folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantized}))
    plan("--model", folder, "--method", "adamw")
    assert "learn and run refuse" in capsys.readouterr().out


def test_options_reach_only_the_methods_that_take_them(folder):
    chosen = ["--method", "lora,sparse-masked", "--rank", 4, "--fraction", 0.5]
    plan("--model", folder, "--domains", 1, *chosen, "--json", folder / "plan.json")
    methods = json.loads((folder / "plan.json").read_text())["methods"]
    assert methods["lora"]["settings"]["rank"] == 4
    assert methods["sparse-masked"]["settings"] == {"fraction": 0.5}


def test_a_method_that_cannot_run_dry_is_said_not_to_be_planned(folder, capsys, monkeypatch):
    def fails(self, model, batches):
        raise RuntimeError("a value was expected")

    monkeypatch.setattr("sparse_cl.methods.AdamW.before_domain", fails)
    plan("--model", folder, "--method", "adamw", "--json", folder / "plan.json")
    why = "its code does not run on tensors without values (RuntimeError: a value was expected)"
    assert f"adamw: not planned: {why}." in capsys.readouterr().out
    assert json.loads((folder / "plan.json").read_text())["not_planned"] == {"adamw": why}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "sgd"], "unknown method 'sgd'; there are adamw, lora"),
        (["--method", ","], "--method: expected adamw"),
        (["--method", "adamw", "--max-rank", "3"], "--max-rank is set, but no method of this plan takes it: adamw"),
        (["--method", "lora", "--fraction", "0.1"], "--fraction is set, but no method of this plan takes it: lora"),
        (["--gpu", "b200"], "unknown device 'b200'"),
        (["--gpu", "custom", "--tflops", "3"], "needs --bandwidth, --memory, --price too"),
        (["--method", "adamw", "--length", "4096"], "length: expected at most the model's context of 2048"),
        (["--gpus", "2,0"], "--gpus: expected numbers of at least 1 such as 1,8,64, got 2,0"),
        (["--gpus", ","], "--gpus: expected numbers of at least 1"),
        (
            ["--gpu", "custom", "--gpus", "2", "--tflops", "1", "--bandwidth", "1", "--memory", "1", "--price", "1"],
            "--gpus 2: how fast custom devices send to each other is unknown; give --link",
        ),
        (["--json", "/nowhere/plan.json"], "its folder does not exist"),
        (["--method", "orthogonal", "--max-rank", "1000"], "max_rank: expected at most the width"),
    ],
)
def test_bad_input(folder, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan("--model", folder, *arguments)


def test_a_configuration_that_refuses_itself_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}')
    with pytest.raises(ValueError, match="no configuration of a transformers model could be read"):
        plan("--model", tmp_path, "--method", "adamw")


@pytest.mark.parametrize(("text", "tokens"), [("1.5k", 1500), ("2e6", 2e6), ("3B", 3e9), ("7", 7)])
def test_numbers_of_tokens(folder, text, tokens):
    plan("--model", folder, "--domains", 1, "--method", "adamw", "--tokens", text, "--json", folder / "plan.json")
    assert json.loads((folder / "plan.json").read_text())["run"]["tokens"] == tokens


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        *((f"--tokens={text}", "expected a positive number such as 20M") for text in ("-3M", "M", "nanM", "many")),
        ("--precision=int8", "invalid choice: 'int8'"),
        ("--domains=0", "expected at least 1, got 0"),
    ],
)
def test_what_the_command_line_refuses(folder, argument, message, capsys):
    with pytest.raises(SystemExit):
        plan("--model", folder, argument)
    assert message in capsys.readouterr().err
