from __future__ import annotations

import json
import sys
from functools import partial

import pytest
import torch
from cases.methods import copy_of, domain, learn, weights

from benchmarks.arena import plasticity
from benchmarks.arena.plasticity import WAYS, L2Init, Recycled, SpectralReset
from sparse_cl.probes import steps_to_fit


def test_l2_init_is_adamw_and_then_a_share_of_the_way_back(tiny_llama):
    model, twin = tiny_llama.double(), copy_of(tiny_llama).double()
    start = weights(model)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    batches = domain(0)
    twin.train()
    for step in range(3):
        twin(**batches[step]).loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p += 1e-2 * 5 * (start[name] - p)
    method = L2Init(decay=5.0)
    learn(method, model, batches, lr=1e-2, steps=3)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, twin.get_parameter(name))
    learn(method, model, domain(1), steps=1)
    assert all(torch.equal(a, b) for a, b in zip(method.start, start.values(), strict=True)), "of the first domain"


def test_spectral_reset_brings_singular_values_back_and_keeps_directions(tiny_llama):
    model, method = tiny_llama.double(), SpectralReset()
    start = weights(model)
    learn(method, model, domain(0))
    for name, p in weights(model).items():
        assert not torch.equal(p, start[name])
        if p.dim() == 2:
            torch.testing.assert_close(torch.linalg.svdvals(p), torch.linalg.svdvals(start[name]))


def test_recycled_draws_a_tenth_anew_between_domains(tiny_llama):
    method = Recycled()
    learn(method, tiny_llama, domain(0))
    before = weights(tiny_llama)["model.layers.0.mlp.down_proj.weight"]
    method.before_domain(tiny_llama, domain(1))
    after = weights(tiny_llama)["model.layers.0.mlp.down_proj.weight"]
    assert int(((after == 0).all(0) & (before != 0).any(0)).sum()) == 2


@pytest.fixture
def small(monkeypatch, tiny_llama, tokenizer, tmp_path):
    """The script on a tiny model and four small domains."""
    names = ("a", "b", "c", "d")
    for name in names:
        rows = [{"prompt": f"{name} {n}", "response": f"{n} {name}"} for n in range(20)]
        (tmp_path / f"{name}.train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(plasticity, "SOURCES", names)
    monkeypatch.setattr(plasticity, "STAGES", (2, 4))
    monkeypatch.setattr(plasticity, "ALONE", 4)
    monkeypatch.setattr(plasticity, "steps_to_fit", partial(steps_to_fit, seeds=(0,), max_steps=2, fixed_steps=1))
    monkeypatch.setattr(plasticity, "load_model", lambda _: (copy_of(tiny_llama), tokenizer))

    def main(*arguments):
        call = [*arguments, "--model", "m", "--data", str(tmp_path), "--json", str(tmp_path / "r.json"), "--steps", "2"]
        monkeypatch.setattr(sys, "argv", ["plasticity", *call])
        plasticity.main()
        return json.loads((tmp_path / "r.json").read_text())

    return main


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_runs_resume_and_each_way_is_measured(small):
    found = small("--only", "AdamW;selective-write, waking")
    assert [run["name"] for run in found["runs"]] == ["AdamW", "selective-write, waking"]
    for run in found["runs"]:
        assert list(run["fits"]) == ["2", "4"]
        assert [entry["domain"] for entry in run["learned"]] == ["a", "b", "c", "d"]
        first, last = run["learned"][0], run["learned"][-1]
        assert first["alone"] == pytest.approx(first["after"], rel=1e-6), "alone is what a first domain is"
        assert last["last"] == pytest.approx(last["after"], rel=1e-6)
        assert run["woken"]["lowest"]["neurons"] == 4
        assert 0 < run["woken"]["lowest"]["update"]["share"] < 1
    again = small("--only", "AdamW;selective-write, waking")
    assert again == found


def test_every_way_makes_a_method_of_its_own():
    for make, lr in WAYS.values():
        assert make() is not make() and 0 < lr < 1
