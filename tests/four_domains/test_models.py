"""Models that cannot be loaded, or not be trained by what was asked for, are named in one line."""

from __future__ import annotations

import shutil

import pytest
import transformers
from cases.world import write_world

from sparse_cl.cli import main
from sparse_cl.four_domains import experiment
from sparse_cl.four_domains.settings import Settings


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    return write_world(tmp_path_factory.mktemp("world"), tokenizer)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: there is no such folder; give a model's folder, or its name on"):
        experiment.load_model(str(tmp_path / "nowhere"))


def test_a_folder_of_something_else(world):
    with pytest.raises(ValueError, match=r"data is no model's folder: it has no config\.json; there are code\.eval\.j"):
        experiment.load_model(str(world / "data"))


def test_weights_cut_short(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model cannot be loaded as a causal language model and its tokenizer: "):
        experiment.load_model(str(tmp_path / "model"))


def test_a_tokenizer_that_cannot_pad(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "model")
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="its tokenizer has no token to pad with, and no end token; give it one"):
        experiment.load_model(str(tmp_path / "model"))


def test_all_methods_that_cannot_train_a_model_are_named_at_once(world, tmp_path, tokenizer):
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    settings = Settings(
        model=str(tmp_path / "gpt2"),
        data=str(world / "data"),
        methods=("adamw", "orthogonal-masked", "elastic", "two-four"),
        max_length=32,
    )
    expected = r"orthogonal-masked: .* is a Conv1D, .*; two-four: .*\. The others can be run: --method adamw,elastic$"
    with pytest.raises(ValueError, match=expected):
        experiment.run(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, r"seed must be at least 0 and below 2\*\*32, got -1"),
        ({"seed": 2**32}, r"seed must be at least 0 and below 2\*\*32, got 4294967296"),
    ],
)
def test_a_seed_that_nothing_takes(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(methods=("adamw",), **wrong)


def test_a_rate_for_a_method_that_is_not_run(tmp_path, capsys):
    assert main(["run", "--method", "elastic", "--lr", "adamw=1e-3", "--out", str(tmp_path / "out")]) == 2
    assert "--lr adamw=1e-3: this run has no adamw; its methods are elastic" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
