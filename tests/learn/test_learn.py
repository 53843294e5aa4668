"""`sparse-cl learn`: what it leaves, what the next call makes of it, and what it refuses."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from cases.world import write_world

from sparse_cl.arguments import add_options, chosen
from sparse_cl.cli import main
from sparse_cl.data import EncodedRecords, hold_out, read_records
from sparse_cl.four_domains.sequence import DomainBatches
from sparse_cl.learn.domain import learn
from sparse_cl.learn.settings import LearnSettings
from sparse_cl.methods.carried import load_carried
from sparse_cl.models.losses import mean_loss

SHORT = {"steps": 4, "batch_size": 4, "max_length": 48, "texts": 8, "lr": 5e-3}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    world = write_world(tmp_path_factory.mktemp("world"), tokenizer)
    for name in ("code", "math"):
        lines = (world / "data" / f"{name}.train.jsonl").read_text().splitlines()
        kept = ({key: json.loads(line)[key] for key in ("prompt", "response")} for line in lines[:40])
        (world / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    return world


def settings(world, model, data, out, **others):
    given = {"model": str(world / model), "data": (str(world / f"{data}.jsonl"),), "out": world / out}
    return LearnSettings(**{**SHORT, **given, **others})


def loss_of(model, world, data):
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "model")
    held = hold_out(read_records([str(world / f"{data}.jsonl")]), 0)[1]
    encoded = EncodedRecords(held.records, tokenizer, SHORT["max_length"])
    return mean_loss(model, DomainBatches(encoded, 4, torch.device("cpu"), len(encoded)))


def last(folder):
    return load_carried(folder).domains[-1]


@pytest.fixture(scope="module")
def first(world):
    learn(settings(world, "model", "code", "1-code"))
    return world / "1-code"


def test_the_folder_is_a_model_that_remembers(world, first):
    model = transformers.AutoModelForCausalLM.from_pretrained(first)
    assert loss_of(model, world, "code") == pytest.approx(last(first)["loss"]["after"], abs=1e-5)
    assert last(first)["loss"]["after"] < last(first)["loss"]["before"]
    carried = load_carried(first, model)
    assert [entry["name"] for entry in carried.domains] == ["1-code"]
    assert carried.memory.domains == 2  # the base model's own texts, and the domain
    assert not (first / "unfinished").exists()


def test_the_next_domain_moves_what_was_learned_before_less_than_adamw_does(world, first):
    ids = torch.tensor(
        transformers.AutoTokenizer.from_pretrained(first)((world / "code.jsonl").read_text())["input_ids"]
    )

    @torch.no_grad()
    def outputs(folder):
        return transformers.AutoModelForCausalLM.from_pretrained(folder)(ids[None, :200]).logits

    moved = {}
    for method in ("elastic", "adamw"):
        learn(settings(world, "1-code", "math", f"2-{method}", method=method, steps=20))
        moved[method] = float((outputs(world / f"2-{method}") - outputs(first)).square().mean())
    assert moved["elastic"] < 0.2 * moved["adamw"]
    assert [entry["name"] for entry in load_carried(world / "2-elastic").domains] == ["1-code", "2-elastic"]


def test_it_says_what_is_protected_and_how_far_it_moved(world, first):
    said = []
    learn(settings(world, "1-code", "math", "2-said"), said.append)
    assert "Protected: the base model, 1-code; 15 layers" in "\n".join(said)
    assert any(line.startswith("Earlier domains: a layer's outputs moved by") for line in said)
    said.clear()
    learn(settings(world, "1-code", "math", "2-said"), said.append)
    assert said == [f"{world / '2-said'} holds this model; nothing is left to do"]


def test_only_what_is_remembered_is_called_protected(world):
    said = []
    learn(settings(world, "model", "code", "n-1", protect="none"))
    learn(settings(world, "n-1", "math", "n-2", method="adamw"))
    learn(settings(world, "n-2", "math", "n-3"), said.append)
    kept = "n-1 (not n-2, learned by a method that remembers nothing)"
    assert f"Protected: {kept}; 15 layers" in "\n".join(said)  # and not the base model
    said.clear()
    learn(settings(world, "model", "code", "n-4", method="adamw"))
    learn(settings(world, "n-4", "math", "n-5"), said.append)
    assert any(line.startswith("The model writes 8 texts") for line in said)
    assert [entry["name"] for entry in load_carried(world / "n-5").domains] == ["n-4", "n-5"]


@pytest.mark.parametrize("protect", ["self", "none", "text.txt"])
def test_the_base_model_is_protected_by_its_own_texts_by_a_file_or_not(world, protect):
    (world / "text.txt").write_text("Once upon a time there was a text. " * 20)
    given = str(world / protect) if "." in protect else protect
    said = []
    learn(settings(world, "model", "code", f"p-{protect}", protect=given), said.append)
    assert ("Protected: nothing" in said) == (protect == "none")
    assert load_carried(world / f"p-{protect}").memory.domains == 1 + (protect != "none")


def test_adapters_load_by_peft_as_they_were_trained(world):
    import peft

    learn(settings(world, "model", "code", "a-1", method="elastic-lora"))
    learn(settings(world, "a-1", "math", "a-2", method="elastic-lora"))
    model = peft.AutoPeftModelForCausalLM.from_pretrained(world / "a-2")
    assert loss_of(model, world, "math") == pytest.approx(last(world / "a-2")["loss"]["after"], abs=1e-4)
    learn(settings(world, "a-1", "math", "a-3", method="elastic-lora", merge=True))
    plain = transformers.AutoModelForCausalLM.from_pretrained(world / "a-3")
    assert not (world / "a-3" / "adapter_config.json").exists()
    assert loss_of(plain, world, "math") == pytest.approx(loss_of(model, world, "math"), abs=1e-4)
    # All weights can be trained on from an adapter, and on from a merged model.
    learn(settings(world, "a-2", "code", "a-4"))
    learn(settings(world, "a-3", "code", "a-5", method="elastic-lora"))


def test_a_call_that_was_stopped_goes_on_to_the_same_bits(world, first, monkeypatch):
    whole, cut = settings(world, "1-code", "math", "whole"), settings(world, "1-code", "math", "cut")
    learn(whole)

    class Stopped(Exception):
        pass

    from sparse_cl.learn import work

    on_save = work._Marker.on_save

    def stop(self, args, state, control, **kwargs):
        on_save(self, args, state, control, **kwargs)
        if state.global_step == 2:
            raise Stopped

    monkeypatch.setattr(work._Marker, "on_save", stop)
    with pytest.raises(Stopped):
        learn(cut)
    monkeypatch.undo()
    assert not (world / "cut" / "config.json").exists()
    (world / "cut" / "unfinished" / "checkpoints" / "checkpoint-3").mkdir()  # and one that is half written
    learn(cut)
    for file in ("model.safetensors", "sparse_cl/memory.safetensors"):
        expected, found = (safetensors.torch.load_file(world / name / file) for name in ("whole", "cut"))
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_folder_that_was_being_filled_is_filled(world, first):
    chosen = settings(world, "model", "code", "1-code")
    work = first / "unfinished" / "finished"
    work.mkdir(parents=True)
    (first / "config.json").rename(work / "config.json")
    (first / "complete.json").rename(work / "complete.json")
    learn(chosen)
    assert (first / "config.json").is_file() and not (first / "unfinished").exists()
    (first / "unfinished" / "checkpoints").mkdir(parents=True)  # filled; a kill left a part of what was to be deleted
    learn(chosen)
    assert not (first / "unfinished").exists()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"method": "two-four"}, "method: two-four needs what `sparse-cl run` keeps of a whole sequence; expected one"),
        ({"set": ("strngth=3",)}, "elastic has no option 'strngth'; it has: strength="),
        ({"trainer": ("weight_deca=3",)}, "trainer: TrainingArguments has no 'weight_deca'"),
        ({"trainer": ("learning_rate=3",)}, "trainer: learning_rate is --lr here"),
        ({"trainer": ("weight_decay=0",)}, "trainer: weight_decay is the method's"),
        ({"trainer": ("save_only_model=true",)}, "trainer: save_only_model is refused"),
        ({"trainer": ("save_steps=often",)}, "trainer: TrainingArguments refuses save_steps=often"),
        ({"lr": -1.0}, "lr: expected a rate above 0, got -1"),
        ({"epochs": 0.0}, "epochs: expected a number above 0, got 0"),
        ({"model": "nowhere/at/all", "data": ("absent.jsonl",)}, "nowhere/at/all"),
        ({"data": ("absent.jsonl",)}, "absent.jsonl"),
        (
            {"report_to": "carrier-pigeon"},
            "report_to: expected one that is installed, none.* got 'carrier-p",
        ),
        ({"protect": "absent.txt"}, "--protect absent.txt: cannot be read"),
        ({"max_length": 512}, "max_length: expected at most the model's context of 256, got 512"),
        ({"data": (".",), "out": Path("a/b")}, "out: a/b is inside --data ., whose files are all read as records"),
    ],
)
def test_bad_input_leaves_nothing(world, others, message):
    with pytest.raises((ValueError, OSError), match=message.replace("(", r"\(")):
        given = {"model": str(world / "model"), "data": (str(world / "code.jsonl"),), "out": world / "bad"}
        learn(LearnSettings(**{**SHORT, **given, **others}))
    assert not (world / "bad").exists()


def test_a_folder_of_something_else_is_left_alone(world, first):
    with pytest.raises(ValueError, match="is of another call .it differs in .*steps: 4 there, 5 now"):
        learn(settings(world, "model", "code", "1-code", steps=5))
    (world / "mine").mkdir(exist_ok=True)
    (world / "mine" / "diary.txt").write_text("dear")
    with pytest.raises(ValueError, match="mine is not empty and holds no model of sparse-cl learn"):
        learn(settings(world, "model", "code", "mine"))


def test_the_command(world, capsys):
    data = [str(world / f"{name}.jsonl") for name in ("code", "math")]
    arguments = [
        "learn",
        "--model",
        str(world / "model"),
        "--data",
        *data,
        "--out",
        str(world / "shown"),
        "--show-data",
    ]
    assert main([*arguments, "--set", "strength=7", "--trainer", "max_grad_norm=0", "warmup_steps=1"]) == 0
    assert capsys.readouterr().out.startswith("76 records (prompt/response) from ")
    assert not (world / "shown").exists()


def test_an_option_that_is_given_twice_adds_to_the_first(tmp_path):
    parser = argparse.ArgumentParser()
    add_options(parser, LearnSettings)
    given = "--model m --out o --data a b --data c --set strength=3 --set every=4 --trainer save_steps=5"
    found = chosen(LearnSettings, parser.parse_args(given.split()))
    assert (found.data, found.set, found.trainer) == (("a", "b", "c"), ("strength=3", "every=4"), ("save_steps=5",))
    assert chosen(LearnSettings, parser.parse_args(["--model", "m", "--out", "o", "--data", "a"])).set == ()


def test_rates_and_steps_by_default(world):
    plain = LearnSettings(model="m", data=("d",), out=world / "x")
    assert (plain.rate(adapters=False), plain.rate(adapters=True)) == (2e-5, 2e-4)
    learn(settings(world, "model", "code", "epochs", steps=None, epochs=0.5, gradient_accumulation=2, protect="none"))
    assert last(world / "epochs")["steps"] == math.ceil(math.ceil(38 / 4 / 2) * 0.5)
