"""The README's Python snippets run as they stand, one after the other, as a reader would paste them."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from cases.methods import domain

README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def readers_names(model):
    """What a snippet takes for granted."""
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (64, 16))
    return {"model": model, "train_dataset": [{"input_ids": row, "labels": row} for row in ids]}


def changed_where_masked(names, start):
    for name, param in names["model"].named_parameters():
        active = names["masks"][name].to_dense() if name in names["masks"] else torch.zeros(param.shape).bool()
        assert torch.equal(param[~active], start[name][~active]), name
        assert not active.any() or (param[active] != start[name][active]).float().mean() > 0.9, name


def test_the_plain_loop(capsys):
    snippet = next(s for s in SNIPPETS if "optimizer.clip_grad_norm_" in s)
    before, after = snippet.split("for _ in range(10):")
    names: dict = {}
    exec(before, names)
    start = {n: p.detach().clone() for n, p in names["model"].named_parameters()}
    exec("for _ in range(10):" + after, names)
    for name, param in names["model"].named_parameters():
        active = names["masks"][name].to_dense()
        assert torch.equal(param[~active], start[name][~active]), name
        assert (param[active] != start[name][active]).all(), name


def test_the_trainer(tmp_path, monkeypatch, tiny_llama):
    monkeypatch.chdir(tmp_path)
    names = readers_names(tiny_llama)
    start = {n: p.detach().clone() for n, p in names["model"].named_parameters()}
    exec(next(s for s in SNIPPETS if "Trainer(" in s), names)
    assert names["trainer"].state.global_step == 10
    changed_where_masked(names, start)


def test_active_layers_in_the_trainer(tmp_path, monkeypatch, tiny_llama):
    monkeypatch.chdir(tmp_path)
    names = readers_names(tiny_llama)
    names |= {"Trainer": transformers.Trainer, "TrainingArguments": transformers.TrainingArguments}
    start = {n: p.detach().clone() for n, p in tiny_llama.named_parameters()}
    exec(next(s for s in SNIPPETS if "activate(model" in s), names)
    assert {type(module) for module in tiny_llama.modules() if isinstance(module, torch.nn.Linear)} == {torch.nn.Linear}
    changed_where_masked(names, start)


def test_a_method_in_a_loop_of_one_s_own(tiny_llama):
    batches = domain(0)
    names = {"model": tiny_llama, "batches": batches}
    before = sum(tiny_llama(**batch).loss.item() for batch in batches)
    exec(next(s for s in SNIPPETS if "before_domain(" in s), names)
    assert names["model"] is tiny_llama
    assert sum(tiny_llama(**batch).loss.item() for batch in batches) < before
    assert names["method"].usage.moments["tokens"].sum() == pytest.approx(2.2)  # two domains, and the text at a fifth


def test_the_memory_and_the_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {}
    exec(next(s for s in SNIPPETS if "SubspaceMemory(" in s), names)
    model, memory = names["model"], names["memory"]
    assert all(0 < layer["used"] < layer["width"] for layer in memory.capacity().values())
    assert (tmp_path / "memory.safetensors").exists()
    before = {name: model.get_parameter(name).detach().clone() for name in memory.names}
    exec(next(s for s in SNIPPETS if "orthogonal_lora(" in s), names)
    for _ in range(5):
        x = torch.randn(32, 64)
        torch.nn.functional.mse_loss(names["adapted"](x), x).backward()
        names["optimizer"].step()
    merged = names["adapted"].merge_and_unload()
    assert all(leak <= 1e-6 for leak in memory.leak(before, merged).values())
    assert all(not torch.equal(merged.get_parameter(name), weight) for name, weight in before.items())


def test_the_probe(tiny_llama):
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (8, 16))
    names = {"model": tiny_llama, "batches": [{"input_ids": part, "labels": part} for part in ids.split(2)]}
    exec(next(s for s in SNIPPETS if "ActivationProbe(" in s), names)
    loss = tiny_llama(input_ids=ids, labels=ids).loss
    loss.backward()
    start = {n: p.detach().clone() for n, p in tiny_llama.named_parameters()}
    names["optimizer"].step()
    assert len(names["masks"]) == 6
    changed_where_masked(names, start)
