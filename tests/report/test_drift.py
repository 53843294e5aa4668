"""Two checkpoints in, one report out: whatever kind of folder the second one is."""

from __future__ import annotations

import html
import json
import re
from functools import partial

import pytest
import torch
import transformers
from cases.world import write_world

from sparse_cl import probes
from sparse_cl.cli import main
from sparse_cl.four_domains import experiment
from sparse_cl.four_domains.domains import load_domains
from sparse_cl.four_domains.evaluate import bits_per_byte
from sparse_cl.four_domains.settings import Settings
from sparse_cl.report import drift
from sparse_cl.report.batches import reference_text, text_batches
from sparse_cl.report.checkpoints import load_checkpoint
from sparse_cl.report.drift import drift_study, sections
from sparse_cl.report.settings import DriftSettings

DOMAINS = ("code", "medical")
SMALL = {"records": 4, "batch_size": 4, "max_length": 64}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    """A tiny model, a data folder, a text, and a finished run of three kinds of method."""
    folder = write_world(tmp_path_factory.mktemp("world"), tokenizer)
    (folder / "text.txt").write_text("Once upon a time there was a text of some length. " * 40)
    settings = Settings(
        model=str(folder / "model"),
        data=str(folder / "data"),
        domains=DOMAINS,
        methods=("adamw", "lora", "orthogonal-lora"),
        steps=3,
        batch_size=4,
        max_length=128,
        eval_records=3,
        lr=dict.fromkeys(("adamw", "lora", "orthogonal-lora"), 2e-2),
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_matrices", "draw_curves", "draw_capacity"):
            patch.setattr(experiment.figures, name, lambda *_: None)
        runs = experiment.run(settings, folder / "out")
    return folder, {run["method"]: run for run in runs}, settings


@pytest.mark.parametrize("method", ["adamw", "lora", "orthogonal-lora"])
@pytest.mark.parametrize("stage", [None, "1-code", "2-medical"])
def test_a_checkpoint_scores_as_it_did_in_the_run(world, tokenizer, method, stage):
    folder, runs, settings = world
    base, _ = experiment.load_model(str(folder / "model"))
    path = folder / "out" / method
    model = load_checkpoint(str(path / stage if stage else path), base).eval()
    assert isinstance(model, transformers.LlamaForCausalLM), "adapters are merged"
    row = runs[method]["R"]["bits_per_byte"][1 if stage == "1-code" else 2]
    for domain, expected in zip(load_domains(DOMAINS, settings.data, 0), row, strict=True):
        assert bits_per_byte(model, tokenizer, domain.test[:3], 128) == pytest.approx(expected, rel=1e-4)


def test_an_adapter_of_peft_and_a_plain_model_are_checkpoints_too(world, tmp_path):
    import shutil

    folder, _, _ = world

    def weights(path):
        model = load_checkpoint(str(path), experiment.load_model(str(folder / "model"))[0])
        return dict(model.named_parameters())

    shutil.copytree(folder / "out" / "lora" / "2-medical", tmp_path / "adapter")
    alone, in_run = weights(tmp_path / "adapter"), weights(folder / "out" / "lora")
    assert all(torch.equal(alone[name], weight) for name, weight in in_run.items())
    base = weights(folder / "model")
    assert any(not torch.equal(base[name], weight) for name, weight in in_run.items())


def test_a_folder_without_a_finished_domain_or_without_a_method_is_refused(world, tmp_path):
    base = experiment.load_model(str(world[0] / "model"))[0]
    (tmp_path / "progress.json").write_text(json.dumps({"stages": [{"domains": [], "reference": None}]}))
    with pytest.raises(ValueError, match="no domain was finished there"):
        load_checkpoint(str(tmp_path), base)
    other = tmp_path / "other"
    (other / "1-code").mkdir(parents=True)
    (other / "progress.json").write_text(json.dumps({"stages": [{"domains": [], "reference": None}] * 2}))
    with pytest.raises(ValueError, match=r"called by no method \(adamw, .*give it the name"):
        load_checkpoint(str(other), base)


def test_the_study_writes_a_record_that_makes_the_same_report(world, tmp_path, monkeypatch):
    monkeypatch.setattr(drift, "TASKS", 1)
    monkeypatch.setattr(probes, "plasticity", partial(probes.plasticity, max_steps=20))
    folder, _, _ = world
    settings = DriftSettings(
        str(folder / "model"),
        str(folder / "out" / "orthogonal-lora"),
        text=str(folder / "text.txt"),
        data=str(folder / "data"),
        domains=DOMAINS,
        plasticity=True,
        **SMALL,
    )
    record = drift_study(settings, tmp_path / "report")
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "report.html",
        "results.json",
        "tensors.safetensors",
    ]
    assert json.loads((tmp_path / "report" / "results.json").read_text()) == json.loads(json.dumps(record))
    assert list(record["drift"]["layers"]) == ["model.layers.0", "model.layers.1"]
    assert list(record["connectivity"]["domains"]) == list(DOMAINS)
    assert len(record["plasticity"]["before"]["fits"]) == 1
    assert set(record["smearing"]["hubs"]) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    # LoRA changes the linear layers and nothing else.
    changed = {name for name, w in record["update_rank"]["weights"].items() if w["effective_rank"] > 0}
    assert all("proj" in name for name in changed)
    assert len(changed) == 14
    text = (tmp_path / "report" / "report.html").read_text()
    for section in sections(record):
        assert section.title in text
    assert not re.search(r"(src|href)=[\"']?https?:", text)


def test_the_same_checkpoint_twice_did_not_drift(world, tmp_path):
    folder, _, _ = world
    model = str(folder / "model")
    record = drift_study(DriftSettings(model, model, text=str(folder / "text.txt"), **SMALL), tmp_path / "out")
    assert all(layer["change"] == 0.0 and layer["cka"] == 1.0 for layer in record["drift"]["layers"].values())
    assert "connectivity" not in record
    shown = sections(record)
    assert [section.title for section in shown] == ["Drift of hidden states", "Smearing", "Rank"]
    for section, sentence in zip(
        shown, ("no hidden state changed", "None of the 2 MLPs", "None of the 16"), strict=True
    ):
        assert sentence in section.sentence


def test_bad_input_is_refused_and_nothing_is_written(world, tmp_path, tokenizer):
    folder, _, _ = world
    model = str(folder / "model")
    config = transformers.LlamaConfig.from_pretrained(model, intermediate_size=20)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "narrow")
    tokenizer.save_pretrained(tmp_path / "narrow")
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.gate_proj\.weight is \(40, 16\) before and \(20, 16\) after"
    ):
        drift_study(DriftSettings(model, str(tmp_path / "narrow"), **SMALL), out)
    with pytest.raises(ValueError, match="records: expected at least 1, got 0"):
        drift_study(DriftSettings(model, model, **{**SMALL, "records": 0}), out)
    with pytest.raises(ValueError, match="max_length: expected at most the model's context of 256 tokens, got 512"):
        drift_study(DriftSettings(model, model, **{**SMALL, "max_length": 512}), out)
    with pytest.raises(ValueError, match=r"--text \S+: cannot be read as UTF-8 text"):
        drift_study(DriftSettings(model, model, text=str(tmp_path / "nowhere.txt"), **SMALL), out)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="empty.txt: the file is empty"):
        drift_study(DriftSettings(model, model, text=str(tmp_path / "empty.txt"), **SMALL), out)
    assert not out.exists()
    with pytest.raises(ValueError, match="is not empty"):
        drift_study(DriftSettings(model, model, **SMALL), tmp_path / "narrow")


def test_windows_hold_every_token_of_the_text_once_and_in_order(tokenizer):
    text = reference_text(None)[:3000]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    batches = text_batches(tokenizer, text, 64, 4)
    seen = [
        i for b in batches for row, m in zip(b["input_ids"], b["attention_mask"], strict=True) for i in row[m.bool()]
    ]
    assert [int(i) for i in seen] == ids
    assert max(b["input_ids"].shape[1] for b in batches) == 64


def test_the_command_tells_what_the_report_says_and_leaves_a_full_folder_alone(world, tmp_path, capsys):
    folder, _, _ = world
    arguments = ["drift", str(folder / "model"), str(folder / "out" / "adamw"), "--text", str(folder / "text.txt")]
    arguments += ["--domains", ",".join(DOMAINS), "--data", str(folder / "data"), "--records", "4", "--batch-size", "4"]
    arguments += ["--max-length", "64", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    for section in sections(record):
        assert section.sentence in told and html.escape(section.sentence, quote=False) in page.replace("&#39;", "'")
    assert list(record["connectivity"]["domains"]) == list(DOMAINS)
    assert main(arguments) == 2
    assert "is not empty; give another --out, or delete it" in capsys.readouterr().err
