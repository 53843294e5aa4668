from __future__ import annotations

import pytest
import transformers

from sparse_cl.four_domains import embedded_model
from sparse_cl.four_domains.embedded_model import cache_folder, embedded_model_folder

SMALL = {"lines": 200, "vocabulary": 300, "steps": 2, "batch_size": 2, "hidden_size": 16, "intermediate_size": 16}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_CL_CACHE", str(tmp_path / "cache"))


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("SPARSE_CL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "sparse_cl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder().parts[-2:] == (".cache", "sparse_cl")


def test_it_is_pretrained_once(monkeypatch):
    folder = embedded_model_folder(SMALL)
    assert not list(folder.glob("*.bin")), "weights are safetensors, never pickles"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("Any text: é ✓ 12\n")["input_ids"]) == "Any text: é ✓ 12\n"
    transformers.AutoModelForCausalLM.from_pretrained(folder)

    monkeypatch.setattr(embedded_model, "train", None)
    assert embedded_model_folder(SMALL) == folder
    assert len(list(folder.parent.iterdir())) == 1


def test_another_recipe_has_another_place():
    assert embedded_model_folder(SMALL) != embedded_model_folder({**SMALL, "seed": 1})


def test_an_interrupted_pretraining_leaves_nothing(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded_model, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded_model_folder(SMALL)
    assert list(cache_folder().iterdir()) == []
