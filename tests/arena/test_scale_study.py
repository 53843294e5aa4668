"""What benchmarks/arena/scale_study.py takes for granted: its models differ in width alone, and `train` can go on."""

import argparse

import pytest
import torch

from benchmarks.arena import scale_study as study


def test_logits_start_equally_large_at_every_width(tokenizer):
    ids = torch.randint(1, len(tokenizer), (4, 32), generator=torch.Generator().manual_seed(0))
    spreads = []
    for width in (32, 128, 512):
        model = study.make_model(width, 0, tokenizer).eval()
        spreads.append(float(model(input_ids=ids).logits.detach().std()))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.config.num_hidden_layers == 2
    assert max(spreads) < 1.3 * min(spreads)


@pytest.mark.parametrize("width", [32, 64, 512])
def test_rates_of_matrices_fall_as_the_width_rises(tokenizer, width):
    model = study.make_model(width, 0, tokenizer)
    groups = study.optimizer(model, 1e-2).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert rates[id(model.model.embed_tokens.weight)] == rates[id(model.model.norm.weight)] == 1e-2
    assert rates[id(model.model.layers[0].mlp.up_proj.weight)] == pytest.approx(1e-2 * 64 / width)


def test_training_lowers_the_loss_and_goes_on_where_it_stopped(tokenizer, tmp_path, monkeypatch, capsys):
    for name, value in {"WIDTHS": (32,), "SEEDS": (0,), "STEPS": 12, "BATCH": 4, "BLOCK": 16}.items():
        monkeypatch.setattr(study, name, value)
    text, folder = tmp_path / "text.txt", tmp_path / "tokenizer"
    text.write_text("What is one plus two? The answer is three. " * 2000)
    tokenizer.save_pretrained(folder)
    arguments = argparse.Namespace(tokenizer=str(folder), text=text, models=tmp_path)
    study.train_all(arguments)
    lines = [line for line in capsys.readouterr().out.splitlines() if "held-out" in line]
    random, pretrained = (float(line.split("loss ")[1].split(" ")[0]) for line in lines)
    assert pretrained < random - 0.5
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} >= {"random-32-0", "pretrained-32-0"}
    study.train_all(arguments)
    assert "held-out" not in capsys.readouterr().out


def test_a_text_that_is_too_short_is_refused(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("one plus two")
    with pytest.raises(SystemExit, match="too short; 4064 blocks of 128 tokens"):
        study.blocks_of_text(tmp_path / "text.txt", tokenizer)
