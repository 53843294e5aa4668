"""`sparse-cl learn --stream`: one call, several domains, and nobody says where one ends."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
from cases.world import write_world

from sparse_cl.learn import work
from sparse_cl.learn.domain import learn
from sparse_cl.learn.settings import LearnSettings
from sparse_cl.methods.carried import load_carried

SHORT = {"batch_size": 4, "max_length": 48, "protect": "none", "lr": 5e-3, "stream": True}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    world = write_world(tmp_path_factory.mktemp("world"), tokenizer)
    for name in ("code", "math"):
        lines = (world / "data" / f"{name}.train.jsonl").read_text().splitlines()
        kept = ({key: json.loads(line)[key] for key in ("prompt", "response")} for line in lines[:84])
        (world / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    return world


def settings(world, out, *names, **others):
    data = tuple(str(world / f"{name}.jsonl") for name in names or ("code", "math"))
    return LearnSettings(**{**SHORT, "model": str(world / "model"), "data": data, "out": world / out, **others})


@pytest.fixture(scope="module")
def both(world):
    said = []
    learn(settings(world, "both"), said.append)
    return load_carried(world / "both"), "\n".join(said)


def test_the_folder_carries_what_calls_for_each_domain_would_leave(world, both):
    carried, said = both
    assert carried.memory.domains == 2
    first, second = carried.domains
    assert (first["name"], second["name"]) == ("both-1", "both-2")
    assert 18 <= first["steps"] <= 22 and first["steps"] + second["steps"] == 40
    assert f"both-1 ({first['steps']} steps), both-2 ({second['steps']} steps)" in said
    assert second["stream"]["loss"]["after"] < second["stream"]["loss"]["before"]
    more = []
    learn(settings(world, "both"), more.append)
    assert more == [f"{world / 'both'} holds this model; nothing is left to do"]
    learn(settings(world, "after", "code", model=str(world / "both"), stream=False, steps=2), more.append)
    assert any("Protected: both-1, both-2;" in line for line in more)
    assert [entry["name"] for entry in load_carried(world / "after").domains] == ["both-1", "both-2", "after"]


def test_a_call_that_was_stopped_goes_on_to_the_same_bits_and_forgets_no_domain(world, both, monkeypatch):
    on_save = work._Marker.on_save
    for stop in (16, 32):  # before the boundary and after it

        def stopping(self, args, state, control, stop=stop, **kwargs):
            on_save(self, args, state, control, **kwargs)
            if state.global_step == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(work._Marker, "on_save", stopping)
        with pytest.raises(KeyboardInterrupt):
            learn(settings(world, "cut"))
    monkeypatch.undo()
    learn(settings(world, "cut"))
    for file in ("model.safetensors", "sparse_cl/memory.safetensors"):
        expected, found = (safetensors.torch.load_file(world / name / file) for name in ("both", "cut"))
        assert all(expected[key].equal(found[key]) for key in expected)
    assert [entry["steps"] for entry in load_carried(world / "cut").domains] == [e["steps"] for e in both[0].domains]


def test_a_checkpoint_without_what_was_protected_is_not_gone_on_from(world, monkeypatch):
    def stopping(self, args, state, control, on_save=work._Marker.on_save, **kwargs):
        on_save(self, args, state, control, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(work._Marker, "on_save", stopping)
    with pytest.raises(KeyboardInterrupt):
        learn(settings(world, "lost"))
    monkeypatch.undo()
    (found,) = (world / "lost").rglob("protection.safetensors")
    found.unlink()
    with pytest.raises(RuntimeError, match="training goes on at step 4, but there is no sparse_cl/protection"):
        learn(settings(world, "lost"))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            {"method": "elastic-lora"},
            "stream: elastic-lora cannot begin a domain while it trains; take --method elastic",
        ),
        ({"method": "adamw"}, "stream: adamw cannot begin a domain"),
        ({"shard": True}, "stream: processes would see different batches; leave --shard out"),
        ({"epochs": 2.0}, "epochs: expected at most one pass over a stream, got 2.0"),
        ({"steps": 41}, "steps: expected at most the 40 of one pass over a stream, got 41"),
        ({"trainer": ("train_sampling_strategy=random",)}, "trainer: train_sampling_strategy would mix the domains"),
        ({"batch_size": 16}, "stream: 160 records are 10 batches of 16; the first 16 are what a domain is known by"),
        ({"steps": 16}, "steps: 16 of a stream are 16 batches of 4; the first 16 are what a domain is known by"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(world, others, message):
    with pytest.raises(ValueError, match=message):
        learn(settings(world, "bad", **others))
    assert not (world / "bad").exists()
