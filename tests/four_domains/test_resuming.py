"""Runs that were stopped, disks that fill up, folders that are damaged, methods that fail."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from cases.world import write_world

from sparse_cl.cli import main
from sparse_cl.four_domains import experiment
from sparse_cl.four_domains.files import CheckpointError, check_complete, complete, write_json
from sparse_cl.four_domains.sequence import _Learner
from sparse_cl.four_domains.settings import Settings
from sparse_cl.methods import METHODS, AdamW

DOMAINS = ("code", "math")
pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    return write_world(tmp_path_factory.mktemp("world"), tokenizer)


def settings_in(world, *methods, **other):
    chosen = {
        "model": str(world / "model"),
        "data": str(world / "data"),
        "domains": DOMAINS,
        "methods": methods or ("adamw",),
        "steps": 2,
        "batch_size": 4,
        "max_length": 32,
        "eval_records": 2,
        "metrics": ("bits_per_byte",),
    }
    return Settings(**{**chosen, **other})


@pytest.fixture(scope="module")
def undisturbed(world):
    """The results of a run that nothing happened to."""
    experiment.run(settings_in(world), world / "undisturbed")
    return (world / "undisturbed" / "results.json").read_bytes()


@pytest.fixture
def learned(monkeypatch):
    """Names of the domains that are trained, as they are."""
    names = []
    learn = _Learner.learn

    def noting(self, model, number, name, *rest):
        names.append(name)
        return learn(self, model, number, name, *rest)

    monkeypatch.setattr(_Learner, "learn", noting)
    return names


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Full(RuntimeError):
    """As safetensors tells it."""


def fails_at(monkeypatch, owner, name, count, error=full):
    """Lets a function work `count` times, then fail."""
    real, calls = getattr(owner, name), []

    def sometimes(*args, **kwargs):
        calls.append(args)
        return error() if len(calls) > count else real(*args, **kwargs)

    monkeypatch.setattr(owner, name, sometimes)


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        (Path, "write_text", 0),
        (Path, "write_text", 4),
        (os, "replace", 3),
        (transformers.PreTrainedModel, "save_pretrained", 0),
        (transformers.PreTrainedModel, "save_pretrained", 1),
        (Path, "rename", 1),
        (AdamW, "save", 1),
    ],
)
def test_a_full_disk_keeps_the_last_complete_state(
    world, undisturbed, tmp_path, monkeypatch, learned, owner, name, count
):
    out = tmp_path / "out"
    with monkeypatch.context() as during:
        fails_at(during, owner, name, count)
        with pytest.raises(OSError, match="No space left"):
            experiment.run(settings_in(world), out)
    assert not (out / "results.json").exists()
    assert not list(out.rglob("*.part"))
    done = 0
    if (out / "adamw" / "progress.json").is_file():
        done = len(json.loads((out / "adamw" / "progress.json").read_text())["stages"]) - 1
    for folder in out.glob("adamw/[0-9]-*"):
        check_complete(folder)
    learned.clear()
    experiment.run(settings_in(world), out)
    assert learned == list(DOMAINS[done:]), "what was finished is not done again"
    assert (out / "results.json").read_bytes() == undisturbed


def test_a_full_disk_is_known_by_the_words_of_other_libraries(world, tmp_path, monkeypatch):
    def error(*_args):
        raise Full('Error while serializing: IoError(Os { code: 28, message: "No space left on device" })')

    fails_at(monkeypatch, transformers.PreTrainedModel, "save_pretrained", 0, error)
    with pytest.raises(OSError, match=r"disk of .*out is full .* the same command then goes on"):
        experiment.run(settings_in(world), tmp_path / "out")


def stopped_after(world, out, monkeypatch, name):
    """A run of adamw that ends when this domain begins."""
    learn = _Learner.learn

    def stopping(self, model, number, domain, *rest):
        if domain == name:
            raise KeyboardInterrupt
        return learn(self, model, number, domain, *rest)

    with monkeypatch.context() as during:
        during.setattr(_Learner, "learn", stopping)
        with pytest.raises(KeyboardInterrupt):
            experiment.run(settings_in(world), out)


def test_a_checkpoint_cut_short_is_named_and_its_domain_learned_again_once_it_is_deleted(
    world, undisturbed, tmp_path, monkeypatch, learned
):
    out = tmp_path / "out"
    stopped_after(world, out, monkeypatch, "math")
    weights = out / "adamw" / "1-code" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="adamw failed"):
        (run,) = experiment.run(settings_in(world), out)
    size = weights.stat().st_size
    assert f"{weights}: it has {size:,} bytes, where {size + 100:,} bytes were written. Delete" in run["failed"]
    learned.clear()
    for file in weights.parent.iterdir():
        file.unlink()
    weights.parent.rmdir()
    with pytest.warns(UserWarning, match="1-code is absent; adamw learns code again"):
        experiment.run(settings_in(world), out)
    assert learned == ["code", "math"]
    assert (out / "results.json").read_bytes() == undisturbed


def test_what_was_trained_and_not_scored_is_trained_again(world, undisturbed, tmp_path, monkeypatch, learned):
    out = tmp_path / "out"
    with monkeypatch.context() as during:
        during.setattr("sparse_cl.four_domains.sequence.score_all", full)
        during.setattr(experiment, "is_disk_full", lambda error: True)
        with pytest.raises(OSError):
            experiment.run(settings_in(world), out)
    assert (out / "adamw" / "1-code" / "model.safetensors").is_file()
    experiment.run(settings_in(world), out)
    assert learned == ["code", "code", "math"]
    assert (out / "results.json").read_bytes() == undisturbed


def test_folders_are_whole_or_not_there(tmp_path):
    building, folder = tmp_path / "building", tmp_path / "1-code"
    building.mkdir()
    folder.mkdir()
    (folder / "old").write_text("of a run that was killed")
    (building / "a.bin").write_bytes(b"12345")
    complete(building, folder)
    check_complete(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["a.bin", "complete.json"]
    assert not building.exists()
    (folder / "a.bin").unlink()
    with pytest.raises(CheckpointError, match=r"a\.bin: it is absent, where 5 bytes were written"):
        check_complete(folder)
    (folder / "complete.json").unlink()
    with pytest.raises(CheckpointError, match="no complete.json"):
        check_complete(folder)


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


class Breaks(METHODS["adamw"]):
    """Fails in the second domain while it is told to."""

    name = "breaks"
    kind = "ours"
    broken = True

    def before_domain(self, model, batches):
        self.number = getattr(self, "number", 0) + 1
        if self.broken and self.number > 1:
            raise RuntimeError("the wheel\ncame off")
        return model

    def restore(self, base, folders):
        self.number = len(folders)
        return super().restore(base, folders)


def test_a_method_that_fails_takes_no_other_down_and_is_tried_again(world, tmp_path, monkeypatch, capsys, learned):
    monkeypatch.setitem(METHODS, "breaks", Breaks)
    out = tmp_path / "out"
    arguments = ["run", "--model", str(world / "model"), "--data", str(world / "data"), "--domains", "code,math"]
    arguments += ["--method", "breaks,adamw", "--steps", "2", "--batch-size", "4", "--max-length", "32"]
    arguments += ["--eval-records", "2", "--metrics", "bits_per_byte", "--out", str(out)]
    assert main(arguments) == 1
    told = capsys.readouterr()
    assert told.out.startswith("breaks FAILED: RuntimeError: the wheel\nadamw alone was run: it forgot")
    assert "Warning: breaks failed and is left out: RuntimeError: the wheel" in told.err
    broken, adamw = json.loads((out / "results.json").read_text())["runs"]
    assert broken["failed"] == "RuntimeError: the wheel\ncame off"
    assert "R" not in broken and "R" in adamw
    assert learned == ["code", "math", "code", "math"]
    learned.clear()
    monkeypatch.setattr(Breaks, "broken", False)
    assert main(arguments) == 0
    assert learned == ["math"], "the failed method goes on where it failed, the other is finished"
    broken, again = json.loads((out / "results.json").read_text())["runs"]
    assert again == adamw
    assert broken["R"] == adamw["R"]


class OnlyLast(METHODS["adamw"]):
    """As the bound that trains on all domains at once: no step before the last domain."""

    name, kind = "only-last", "bound"

    def steps(self, steps, number, domains, protected=False):
        return steps if number == domains - 1 else 0


def test_a_domain_without_steps_has_the_scores_before_it_and_no_folder(world, tmp_path, monkeypatch, learned):
    monkeypatch.setitem(METHODS, "only-last", OnlyLast)
    settings = settings_in(world, "only-last", domains=("code", "math", "general"))
    out = tmp_path / "out"
    with monkeypatch.context() as during:
        during.setattr("sparse_cl.four_domains.sequence.score_all", full)
        during.setattr("sparse_cl.four_domains.experiment.score_all", experiment.score_all)
        with pytest.raises(OSError):
            experiment.run(settings, out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no folder of a domain that was not trained is missed
        (run,) = experiment.run(settings, out)
    R = run["R"]["bits_per_byte"]
    assert R[0] == R[1] == R[2] != R[3]
    assert learned == ["general", "general"]
    assert [path.name for path in sorted((out / "only-last").iterdir())] == ["3-general", "progress.json"]


class Protects(METHODS["adamw"]):
    """Notes what it is given to protect."""

    name, kind, protects = "protects", "ours", True
    given = []

    def protect(self, model, batches):
        self.given.append([{name: tensor.clone() for name, tensor in batch.items()} for batch in batches])


def test_a_text_is_given_to_protect_before_the_first_domain_and_again_if_that_was_not_finished(
    world, tmp_path, monkeypatch, tokenizer
):
    monkeypatch.setitem(METHODS, "protects", Protects)
    monkeypatch.setattr(Protects, "given", [])
    text = tmp_path / "text.txt"
    text.write_text("What is one plus two? " * 900)
    settings = settings_in(world, "adamw", "protects", protect=str(text))
    out = tmp_path / "out"
    with monkeypatch.context() as during:
        during.setattr(Protects, "before_domain", full)
        with pytest.raises(OSError):
            experiment.run(settings, out)
    runs = experiment.run(settings, out)
    first, again = Protects.given
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    for given in (first, again):
        assert torch.cat([batch["input_ids"] for batch in given]).flatten().tolist() == ids[: 128 * 32]
        assert all(torch.equal(batch["input_ids"], batch["labels"]) for batch in given)
        assert all(batch["attention_mask"].all() for batch in given)
    assert [run["protects"] for run in runs] == [False, True]
    told = (out / "comparison.txt").read_text()
    assert f"Text to protect: {text}; protected by protects; without it: adamw." in told
    assert experiment.run(settings, out) == runs and len(Protects.given) == 2


def test_data_that_changed_is_named_and_nothing_is_mixed(world, tmp_path, monkeypatch):
    monkeypatch.setattr(METHODS["adamw"], "after_domain", full)
    place = tmp_path / "world"
    shutil.copytree(world, place, ignore=shutil.ignore_patterns("undisturbed"))
    out = tmp_path / "out"
    with pytest.raises(OSError, match="No space left"):
        experiment.run(settings_in(place), out)
    monkeypatch.undo()
    file = place / "data" / "math.test.jsonl"
    kept = file.read_text()
    file.write_text(kept.replace('"prompt": "', '"prompt": "So: ', 1))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(experiment.FolderError, match=r"what math holds changed since this run began"):
        experiment.run(settings_in(place), out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    file.write_text(kept)
    weights = next((place / "model").glob("*.safetensors"))
    saved = weights.read_bytes()
    weights.write_bytes(saved[:-1] + bytes([saved[-1] ^ 1]))
    with pytest.raises(experiment.FolderError, match=r"what --model holds changed since this run began"):
        experiment.run(settings_in(place), out)
    weights.write_bytes(saved)
    assert experiment.run(settings_in(place), out)[0]["R"]
