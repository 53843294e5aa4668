"""What a model folder carries: a fresh process goes on with the same bits, and mixed-up files are refused."""

from __future__ import annotations

import json
import os

import huggingface_hub
import pytest
from cases.methods import copy_of, domain, learn, same, weights
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from sparse_cl import SubspaceMemory
from sparse_cl.methods import Carried, Curvature, Elastic, ElasticLoRA, Orthogonal, load_carried, save_carried
from sparse_cl.methods.carried import HISTORY, MEMORY

ENTRY = {"name": "code", "method": "elastic", "lr": 1e-2, "steps": 6}


def learned(model, folder, **options):
    method = Elastic(**options)
    learn(method, model, domain(0))
    model.save_pretrained(folder)
    save_carried(folder, Carried(method.memory, [ENTRY]))
    return method


def test_a_fresh_process_goes_on_where_the_last_one_ended(tiny_llama, tmp_path):
    method = learned(tiny_llama, tmp_path)
    model = type(tiny_llama).from_pretrained(tmp_path).eval()
    carried = load_carried(tmp_path, model)
    assert carried.domains == [ENTRY]
    other = Elastic()
    other.remember(model, carried.memory)
    expected, found = (learn(m, x, domain(1)) for m, x in ((method, tiny_llama), (other, model)))
    assert same(weights(expected), weights(found))
    assert method.record() == other.record()


def test_what_a_run_leaves_is_carried_too(tiny_llama, tmp_path):
    learn(Elastic(), tiny_llama, domain(0), folder=tmp_path)
    carried = load_carried(tmp_path, tiny_llama)
    assert carried.memory.domains == 1 and carried.domains == []


def test_a_model_that_was_never_trained_here_carries_nothing(tmp_path):
    assert load_carried(tmp_path) is None


@pytest.mark.parametrize("answer", ["no such file", "silence", "it said so before", "the file"])
def test_a_model_on_the_hub(tiny_llama, tmp_path, monkeypatch, answer):
    learned(tiny_llama, tmp_path)

    def download(repo, name):
        if answer == "the file":
            return str(tmp_path / name)
        raise (RemoteEntryNotFoundError("404", response=Response()) if answer == "no such file" else offline)

    class Response:
        headers, request, status_code, text = {}, None, 404, ""

    offline = LocalEntryNotFoundError("no connection")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    known = huggingface_hub._CACHED_NO_EXIST if answer == "it said so before" else None
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: known)
    if answer == "silence":
        with pytest.raises(ValueError, match="someone/model: neither a folder nor a model on the Hub that could be"):
            load_carried("someone/model")
    else:
        assert (load_carried("someone/model") is None) == (answer != "the file")


def test_a_history_without_a_memory(tmp_path, tiny_llama):
    learned(tiny_llama, tmp_path)
    save_carried(tmp_path, Carried(None, [ENTRY, {"name": "math"}]))
    carried = load_carried(tmp_path)
    assert carried.memory is None and [entry["name"] for entry in carried.domains] == ["code", "math"]


@pytest.mark.parametrize("fault", ["another memory", "no memory", "cut memory", "cut history", "version", "a list"])
def test_files_that_do_not_belong_together_are_refused(tiny_llama, tmp_path, fault):
    learned(tiny_llama, tmp_path)
    memory, history = tmp_path / MEMORY, tmp_path / HISTORY
    if fault == "another memory":
        SubspaceMemory(tiny_llama, source="inputs").save(memory)
    elif fault == "no memory":
        memory.unlink()
    elif fault == "cut memory":
        memory.write_bytes(memory.read_bytes()[:-9])
    elif fault == "cut history":
        history.write_text(history.read_text()[:-9])
    elif fault == "version":
        history.write_text(json.dumps({**json.loads(history.read_text()), "version": 2}))
    else:
        history.write_text("[]")
    with pytest.raises(ValueError, match=f"{tmp_path.name}: .*(memory|history)"):
        load_carried(tmp_path, tiny_llama)


def test_another_model_is_named(tiny_llama, tmp_path):
    learned(tiny_llama, tmp_path)
    config = type(tiny_llama.config)(**{**tiny_llama.config.to_dict(), "intermediate_size": 20})
    with pytest.raises(ValueError, match=f"{tmp_path.name}: the memory tracks .* of shape"):
        load_carried(tmp_path, type(tiny_llama)(config))


def test_writing_leaves_no_half_file(tiny_llama, tmp_path, monkeypatch):
    method = learned(tiny_llama, tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "sparse_cl").iterdir()}
    with pytest.raises(ValueError, match="domains: expected entries with a name, got .* as number 1"):
        save_carried(tmp_path, Carried(method.memory, [ENTRY, {"lr": 1}]))
    with pytest.raises(ValueError, match="domains: expected what JSON can hold"):
        save_carried(tmp_path, Carried(method.memory, [{"name": "x", "lr": float("nan")}]))

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        save_carried(tmp_path, Carried(method.memory, [ENTRY]))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "sparse_cl").iterdir()}


def test_who_may_remember(tiny_llama, tmp_path):
    memory = learned(tiny_llama, tmp_path).memory
    with pytest.raises(ValueError, match="curvature keeps no memory of inputs"):
        Curvature().remember(tiny_llama, memory)
    with pytest.raises(ValueError, match="source: orthogonal was made for 'gradients', but the memory is of 'inputs'"):
        Orthogonal(source="gradients").remember(tiny_llama, memory)
    with pytest.warns(UserWarning, match=r"the memory goes on with its own energy=0\.99, max_rank='auto'"):
        Orthogonal().remember(tiny_llama, memory)
    method = Elastic()
    method.remember(tiny_llama, memory)
    with pytest.raises(ValueError, match="remember comes once"):
        method.remember(tiny_llama, memory)
    with pytest.raises(ValueError, match="protect comes once"):
        method.protect(tiny_llama, domain(1))


def test_an_adapter_on_a_model_that_was_trained_whole(tiny_llama, tmp_path):
    learned(tiny_llama, tmp_path)
    model = copy_of(tiny_llama)
    method = ElasticLoRA()
    method.remember(model, load_carried(tmp_path).memory)
    adapted = learn(method, model, domain(1))
    assert method.memory.domains == 2
    with pytest.raises(ValueError, match="model: expected the base model, which elastic-lora remembers, got a Peft"):
        ElasticLoRA().remember(adapted, method.memory)
