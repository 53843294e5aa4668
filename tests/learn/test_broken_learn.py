"""`sparse-cl learn` where something goes wrong: nothing is lost in silence."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import safetensors.torch
import torch
import transformers
from cases.world import write_world

from sparse_cl.four_domains.training import warmup_of
from sparse_cl.learn.domain import learn
from sparse_cl.learn.own_texts import write_texts
from sparse_cl.learn.settings import LearnSettings
from sparse_cl.learn.work import Work
from sparse_cl.methods.carried import fingerprint, load_carried

SHORT = {"steps": 2, "batch_size": 4, "max_length": 48, "texts": 8, "lr": 5e-3}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    world = write_world(tmp_path_factory.mktemp("world"), tokenizer)
    lines = (world / "data" / "code.train.jsonl").read_text().splitlines()
    kept = ({key: json.loads(line)[key] for key in ("prompt", "response")} for line in lines[:20])
    (world / "code.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    for method in ("elastic", "adamw", "lora"):
        run(world, "model", method, method=method)
    return world


def run(world, model, out, **others):
    said = []
    given = {"model": str(world / model), "data": (str(world / "code.jsonl"),), "out": world / out}
    learn(LearnSettings(**{**SHORT, **given, **others}), said.append)
    return "\n".join(said)


@pytest.mark.parametrize("method", ["elastic-lora", "orthogonal-lora"])
def test_adapters_go_on_from_an_adapter_that_remembers_nothing(world, method):
    import peft

    said = run(world, "lora", f"on-{method}", method=method)
    assert "Protected: the base model (not lora, learned by a method" in said
    assert load_carried(world / f"on-{method}").memory.domains == 2
    base, first = (
        safetensors.torch.load_file(world / name / "adapter_model.safetensors") for name in ("lora", f"on-{method}")
    )
    name = next(name for name in base if "lora_A" in name)
    torch.testing.assert_close(first[name][: len(base[name])], base[name])
    peft.AutoPeftModelForCausalLM.from_pretrained(world / f"on-{method}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj"]}, "the adapter that it has is on other layers"),
        ({"target_modules": "all-linear", "use_dora": True}, "or no plain LoRA .*lora_magnitude"),
        ({"target_modules": "all-linear", "use_rslora": True}, "its adapter has rslora"),
    ],
)
def test_an_adapter_that_does_not_stack_is_refused(world, options, message, tmp_path):
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(world / "model")
    model.config._name_or_path = str(world / "model")
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options)).save_pretrained(tmp_path / "theirs")
    with pytest.raises(
        ValueError, match="theirs holds an adapter without a memory, which elastic-lora could not protect"
    ):
        run(world, tmp_path / "theirs", tmp_path / "x", method="elastic-lora")
    run(world, tmp_path / "theirs", tmp_path / "lora", method="lora")
    with pytest.raises(ValueError, match=message):
        run(world, tmp_path / "lora", tmp_path / "y", method="elastic-lora")


def test_what_is_said_to_be_protected_is(world):
    run(world, "elastic", "adamw-2", method="adamw")
    said = run(world, "adamw-2", "elastic-3")
    assert "Protected: the base model, elastic (not adamw-2, learned by a method that remembers nothing); " in said
    run(world, "model", "bare", protect="none")
    assert "Protected: bare; " in run(world, "bare", "bare-2")


def test_a_memory_where_older_versions_wrote_it_is_found(world):
    shutil.copytree(world / "elastic", world / "older")
    (world / "older" / "sparse_cl" / "memory.safetensors").rename(world / "older" / "memory.safetensors")
    shutil.rmtree(world / "older" / "sparse_cl")
    assert load_carried(world / "older").memory.domains == 2
    assert run(world, "older", "older-2").startswith("Learns") and load_carried(world / "older-2").memory.domains == 3


def test_a_source_or_text_that_changed_is_another_call(world):
    shutil.copytree(world / "elastic", world / "source")
    run(world, "source", "next", method="elastic-lora")
    shutil.rmtree(world / "source")
    shutil.copytree(world / "adamw", world / "source")
    with pytest.raises(ValueError, match="is of another call .it differs in model_files"):
        run(world, "source", "next", method="elastic-lora")
    with pytest.raises(ValueError, match="source is not what the adapter in .*next was trained on: its files changed"):
        run(world, "next", "next-2", method="elastic-lora")
    for word in ("one", "two"):
        (world / "text.txt").write_text(f"{word} three " * 50)
        if word == "one":
            run(world, "model", "texts", protect=str(world / "text.txt"))
    with pytest.raises(ValueError, match="is of another call .it differs in text"):
        run(world, "model", "texts", protect=str(world / "text.txt"))


def test_weights_that_changed_deep_within_a_file_are_others(tmp_path):
    weights = {"a": torch.zeros(1 << 21), "b": torch.zeros(1 << 21)}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    before = fingerprint(str(tmp_path))
    assert before == fingerprint(str(tmp_path))
    weights["b"][1 << 19 : 1 << 20] = 1.0
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    assert fingerprint(str(tmp_path)) != before


def test_a_text_that_cannot_be_protected_any_more_is_named(world):
    (world / "late.txt").write_text("one two " * 50)
    said = run(world, "elastic", "late", protect=str(world / "late.txt"))
    assert "late.txt is not read: it is for what a model knows before its first domain" in said


def test_an_adapters_own_tokenizer_is_used(world):
    shutil.copytree(world / "lora", world / "chatty")
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "model")
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.role }} {{ turn.content }}\n{% endfor %}"
    tokenizer.save_pretrained(world / "chatty")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (world / "chat.jsonl").write_text(
        (json.dumps({"messages": turns}) + "\n") * 2 + json.dumps({"messages": turns[::-1]})
    )
    assert "u|s|er| |a|" in run(world, "chatty", "shown", data=(str(world / "chat.jsonl"),), show_data=True)


def test_what_tensorboard_was_told_stays(tmp_path):
    work = Work(tmp_path / "out")
    work.claim({"a": 1})
    work.begin()
    (work.checkpoints / "runs").mkdir()
    (work.checkpoints / "runs" / "events").write_text("loss")
    work.finish(lambda folder: (folder / "config.json").write_text("{}"))
    assert (tmp_path / "out" / "runs" / "events").read_text() == "loss"
    assert not (tmp_path / "out" / "unfinished").exists()


def test_training_that_diverges_says_so(world):
    with pytest.raises(ValueError, match=r"lr: with 1e\+30 training diverged"):
        run(world, "model", "diverged", lr=1e30)


def test_a_single_step_is_taken(world):
    assert [warmup_of(steps) for steps in (1, 2, 9, 40)] == [0, 1, 1, 4]
    run(world, "model", "single", method="adamw", steps=1)
    loss = load_carried(world / "single").domains[0]["loss"]
    assert loss["after"] != loss["before"]


def test_anothers_folders_are_left_alone(tmp_path):
    (tmp_path / "a" / "unfinished" / "finished").mkdir(parents=True)
    (tmp_path / "a" / "unfinished" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="unfinished is not empty and not of sparse-cl learn"):
        Work(tmp_path / "a")
    (tmp_path / "b" / "sparse_cl").mkdir(parents=True)
    (tmp_path / "b" / "sparse_cl" / "history.json").write_text('{"version": 1, "domains": [], "memory": null}')
    with pytest.raises(ValueError, match="b is not empty and holds no model"):
        Work(tmp_path / "b")


def test_several_processes_are_refused(world, monkeypatch):
    monkeypatch.setattr("sparse_cl.learn.domain.check_processes", lambda: None)
    monkeypatch.setattr("sparse_cl.learn.domain.processes", lambda: type("Two", (), {"num_processes": 2}))
    with pytest.raises(ValueError, match="learn: expected one process, 2 were started"):
        run(world, "model", "several")


@pytest.mark.parametrize("before", ["", "word " * 200])
def test_texts_fit_whatever_the_template_writes(world, before):
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "model")
    tokenizer.chat_template = "{% for turn in messages %}" + before + "{{ turn.content }}{% endfor %}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no room for a message
        texts = write_texts(model, tokenizer, texts=3, length=32, context=64, batch_size=3, seed=0)
    assert all(0 < len(text["input_ids"]) <= 64 for text in texts)
