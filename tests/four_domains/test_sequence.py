"""The whole way on a tiny random model: every method, from the records to the report."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from cases.world import write_world

from sparse_cl.four_domains import experiment
from sparse_cl.four_domains.domains import DataError, load_domains
from sparse_cl.four_domains.embedded import DOMAINS
from sparse_cl.four_domains.evaluate import bits_per_byte
from sparse_cl.four_domains.prepared import Prepared
from sparse_cl.four_domains.results import CLOCKED, read_runs
from sparse_cl.four_domains.sequence import Progress, Scores, _Learner, run_sequence
from sparse_cl.four_domains.settings import Settings
from sparse_cl.methods import METHODS, AdamW

pytestmark = pytest.mark.usefixtures("no_pictures")
SEQUENCE = ("code", "medical", "general")
LEARNERS = ("adamw", "lora", "sparse-masked", "orthogonal", "orthogonal-lora")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    """A tiny model and a data folder on disk."""
    return write_world(tmp_path_factory.mktemp("world"), tokenizer)


def settings_in(world, **other):
    chosen = {
        "model": str(world / "model"),
        "data": str(world / "data"),
        "domains": SEQUENCE,
        "methods": LEARNERS,
        "steps": 3,
        "batch_size": 4,
        "max_length": 64,
        "eval_records": 3,
        "lr": dict.fromkeys(METHODS, 1e-2),
    }
    return Settings(**{**chosen, **other})


@pytest.fixture(scope="module")
def finished(world):
    """A finished run of several methods: its folder, records and settings."""
    reference = world / "reference.txt"
    reference.write_text("Once upon a time there was a text. " * 20)
    settings = settings_in(world, reference=str(reference))
    out = world / "out"
    return out, experiment.run(settings, out), settings


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_results_have_the_documented_layout(finished):
    out, runs, settings = finished
    assert read_runs(out) == runs
    assert [run["method"] for run in runs] == list(LEARNERS)
    for run in json.loads((out / "results.json").read_text())["runs"]:
        assert not set(CLOCKED) & set(run), "what a clock measured would differ the next time"
    for run in runs:
        assert run["domains"] == list(SEQUENCE)
        assert run["seed"] == 0
        assert run["settings"]["steps"] == 3
        assert run["versions"]["torch"] == torch.__version__
        for metric in ("bits_per_byte", "accuracy", "exact_match"):
            assert [len(row) for row in run["R"][metric]] == [3] * 4
        assert all(value is not None for row in run["R"]["bits_per_byte"] for value in row)
        assert all(row[0] is None and row[1] is not None for row in run["R"]["accuracy"])
        assert len(run["R_reference"]) == 4
        assert {"acc", "bwt", "forgetting", "learning_accuracy"} <= set(run["summary"])
        assert run["seconds"] > 0
        assert run["state_bytes"] > 0
        assert run["peak_memory_bytes"] > 0
        assert run["step_seconds"] > 0
        assert run["drift"][0] == 0
        assert all(drift > 0 for drift in run["drift"][1:])
    for name in ("R.png", "curves.png", "capacity.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    text = (out / "comparison.txt").read_text()
    assert all(word in text for word in ("learning_accuracy", "forgetting", "mean_j R[j][j]", "sparse-masked"))
    assert not list(out.rglob("*.bin")), "no pickles"


def test_row_0_is_the_untouched_base_for_every_method(finished, world, tokenizer):
    _, runs, settings = finished
    assert len({tuple(run["R"]["bits_per_byte"][0]) for run in runs}) == 1
    domain = load_domains(settings.domains, settings.data, 0)[0]
    expected = bits_per_byte(load(world / "model").eval(), tokenizer, domain.test[:3], settings.max_length)
    assert runs[0]["R"]["bits_per_byte"][0][0] == pytest.approx(expected, rel=1e-6)


def test_every_method_changes_what_it_may_and_nothing_else(finished, world):
    out, runs, _ = finished
    base = load(world / "model").state_dict()
    after = {method: load(out / method / "3-general").state_dict() for method in ("adamw", "sparse-masked")}
    assert all(not torch.equal(after["adamw"][name], base[name]) for name in base)
    changed = {name for name in base if not torch.equal(after["sparse-masked"][name], base[name])}
    assert changed == {name for name in base if ".mlp." in name}
    for name in changed:
        neurons = (after["sparse-masked"][name] != base[name]).any(0 if "down_proj" in name else 1)
        assert 4 <= neurons.sum() <= 12, "4 neurons of 40 a domain, three domains"
    states = {run["method"]: run["state_bytes"] for run in runs}
    assert states["sparse-masked"] < states["adamw"] / 10
    for method in ("lora", "orthogonal-lora"):
        adapter = out / method / "3-general"
        assert (adapter / "adapter_model.safetensors").is_file()
        assert not (adapter / "model.safetensors").exists()


@pytest.mark.parametrize("method", ["orthogonal", "orthogonal-lora"])
def test_the_capacity_of_each_layer_is_recorded_and_no_domain_leaks(finished, method):
    out, runs, _ = finished
    (run,) = [run for run in runs if run["method"] == method]
    assert [record["domain"] for record in run["domain_records"]] == list(SEQUENCE)
    used = dict.fromkeys(run["domain_records"][0]["layers"], 0)
    assert len(used) == 15, "seven in each of two blocks, and the head"
    for number, record in enumerate(run["domain_records"]):
        assert record["layers"].keys() == used.keys()
        for name, layer in record["layers"].items():
            assert layer["used"] + layer["free"] == layer["width"] == (40 if "down_proj" in name else 16)
            assert layer["used"] >= used[name]
            used[name] = layer["used"]
            assert 0 <= layer["surviving"] <= 1
            assert layer["leak"] is None if number == 0 else layer["leak"] <= 1e-6
    text = (out / "comparison.txt").read_text()
    assert "largest leak" in text
    assert f"Warning: {method}, before " in text
    assert (out / method / "2-medical" / "sparse_cl" / "memory.safetensors").is_file()


def test_lora_trains_one_adapter_on_and_on(finished, world):
    out, _, _ = finished
    import peft

    method = METHODS["lora"]()
    base = load(world / "model")
    first = method.restore(base, [out / "lora" / "1-code"])
    assert method.before_domain(first, []) is first
    adapted = {name for name, p in first.named_parameters() if p.requires_grad}
    assert adapted
    assert all("lora_" in name for name in adapted)
    names = {name.split(".lora_A")[0].rpartition(".")[2] for name in adapted if ".lora_A" in name}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert peft.LoraConfig.from_pretrained(out / "lora" / "1-code").r == 16


def test_a_run_stopped_in_the_middle_ends_as_if_it_had_not_been(finished, world, tmp_path, monkeypatch):
    settings = finished[2]
    out = tmp_path / "out"
    real = experiment.run_sequence

    stops = {"lora": 1, "orthogonal": 2, "orthogonal-lora": 2}

    def stopping(method, *args, **kwargs):
        *args, on_stage = args

        def stop(progress):
            on_stage(progress)
            if len(progress.stages) - 1 == stops.get(method.name):
                raise KeyboardInterrupt

        return real(method, *args, stop, **kwargs)

    monkeypatch.setattr(experiment, "run_sequence", stopping)
    for _ in stops:
        # Each time it gets through the method that it stopped in before, and stops in the next of them.
        with pytest.raises(KeyboardInterrupt):
            experiment.run(settings, out)
    monkeypatch.setattr(experiment, "run_sequence", real)
    learned = []
    learn = _Learner.learn
    monkeypatch.setattr(
        _Learner,
        "learn",
        lambda self, model, number, *rest: (learned.append(number), learn(self, model, number, *rest))[1],
    )
    experiment.run(settings, out)
    assert learned == [3]
    assert (out / "results.json").read_bytes() == (finished[0] / "results.json").read_bytes()


class Remembers(METHODS["adamw"]):
    """A method whose memory is the list of domains that it ended, kept in files of its own."""

    options = ("size",)

    def __init__(self, size=1):
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        self.size, self.ended, self.restored = size, 0, None

    def check(self, model):
        if self.size > 9:
            raise ValueError("size: the model is too small for it")

    def after_domain(self, model, batches):
        self.ended += 1

    def record(self):
        return {"ended": self.ended, "restored": self.restored}

    def save(self, folder):
        assert (folder / "model.safetensors").is_file()
        (folder / "memory.txt").write_text(str(self.ended))

    def restore(self, base, folders):
        self.ended = int((folders[-1] / "memory.txt").read_text())
        self.restored = [folder.name for folder in folders]
        return super().restore(base, folders)


def test_a_method_keeps_its_memory_through_an_interruption(world, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "remembers", Remembers)
    settings = settings_in(world, methods=("remembers",), options={"size": 3}, lr={})
    out = tmp_path / "out"
    real = experiment.run_sequence

    def stops_after_two(*args, **kwargs):
        *args, on_stage = args

        def stop(progress):
            on_stage(progress)
            if len(progress.stages) == 3:
                raise KeyboardInterrupt

        return real(*args, stop, **kwargs)

    monkeypatch.setattr(experiment, "run_sequence", stops_after_two)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(settings, out)
    monkeypatch.setattr(experiment, "run_sequence", real)
    (run,) = experiment.run(settings, out)
    assert run["domain_records"] == [
        {"domain": "code", "ended": 1, "restored": None},
        {"domain": "medical", "ended": 2, "restored": None},
        {"domain": "general", "ended": 3, "restored": ["1-code", "2-medical"]},
    ]
    assert run["settings"]["options"] == {"size": 3}


def test_a_method_that_cannot_train_the_model_stops_before_anything_is_written(world, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "remembers", Remembers)
    settings = settings_in(world, methods=("adamw", "remembers"), options={"size": 10})
    with pytest.raises(ValueError, match="size: the model is too small"):
        experiment.run(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_go_to_the_methods_that_take_them(world, monkeypatch):
    monkeypatch.setitem(METHODS, "remembers", Remembers)
    settings = settings_in(world, methods=("adamw", "remembers"), options={"size": 7})
    assert settings.make_method("remembers").size == 7
    assert settings.make_method("adamw").settings() == {}
    with pytest.raises(ValueError, match=r"size is set, but no method .*: adamw\. Leave it out, or run remembers"):
        settings_in(world, methods=("adamw",), options={"size": 7})
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        settings_in(world, methods=("remembers",), options={"size": 0})


def test_every_method_sees_the_same_batches_in_the_same_order(world, tmp_path, tokenizer):
    settings = settings_in(world, domains=("code", "general"), steps=4, metrics=("bits_per_byte",))
    domains = load_domains(settings.domains, settings.data, 0)
    seen = {}
    for name in LEARNERS:
        method = METHODS[name]
        model = load(world / "model")
        batches = seen[name] = []

        def record(module, args, kwargs, batches=batches):
            if module.training:
                batches.append(kwargs["input_ids"].tolist())

        model.register_forward_pre_hook(record, with_kwargs=True)
        # Draws of a method's own must not shift the order.
        torch.rand(len(seen))
        blank = Progress([Scores([dict.fromkeys(("bits_per_byte", "accuracy", "exact_match"))] * 2, None)])
        prepared = Prepared(settings, str(world / "model"), tokenizer, domains)
        run_sequence(method(), model, prepared, tmp_path / name, blank)
    assert len(seen["adamw"]) == 8, "four steps a domain"
    assert all(batches == seen["adamw"] for batches in seen.values())


def test_a_domain_is_learned_and_the_next_one_starts_from_there(world, tmp_path, tokenizer):
    settings = settings_in(world, domains=("code",), steps=30, batch_size=8, methods=("adamw",))
    (run,) = experiment.run(settings, tmp_path / "out")
    before, after = (row[0] for row in run["R"]["bits_per_byte"])
    assert after < before * 0.8
    assert run["losses"][0]["loss"] > run["losses"][-1]["loss"]


def test_clipping_follows_the_active_entries_only(world, tmp_path, tokenizer, monkeypatch):
    from sparse_cl import SparseMaskedAdamW

    norms = []
    real = SparseMaskedAdamW.clip_grad_norm_
    monkeypatch.setattr(SparseMaskedAdamW, "clip_grad_norm_", lambda self, norm: norms.append(norm) or real(self, norm))
    experiment.run(settings_in(world, methods=("sparse-masked",), domains=("code",)), tmp_path / "out")
    assert norms == [1.0] * 3


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"methods": ("adam",)}, "unknown method 'adam'; there are adamw, lora, .*; or all, ours"),
        ({"methods": ("adamw", "adamw")}, "each once"),
        ({"methods": ()}, "must be named"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"lr": {"adamw": -1.0}}, "must be positive"),
        ({"lr": {"adamw": float("nan")}}, "must be positive"),
        ({"max_length": 8}, "at least 16"),
    ],
)
def test_settings_out_of_range(world, other, message):
    with pytest.raises(ValueError, match=message):
        settings_in(world, **other)


def test_a_context_that_is_too_short_stops_before_anything_is_written(world, tmp_path):
    with pytest.raises(ValueError, match="exceeds the model's context of 256"):
        experiment.run(settings_in(world, max_length=512), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_mlp_stops_before_anything_is_written(world, tmp_path, monkeypatch):
    monkeypatch.setattr("sparse_cl.models.parts.MLPS", ())
    with pytest.raises(ValueError, match="has no MLP that is known here"):
        experiment.run(settings_in(world), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_that_a_method_cannot_train_stop_before_anything_is_written(world, tmp_path, tokenizer):
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tokenizer), n_positions=256)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    settings = settings_in(world, model=str(tmp_path / "gpt2"), methods=("adamw", "orthogonal-masked"))
    with pytest.raises(ValueError, match="is a Conv1D, .* orthogonal-masked needs torch"):
        experiment.run(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", [None, "", b"\xff\xfe\xff"])
def test_a_reference_that_cannot_be_used(world, tmp_path, text):
    path = tmp_path / "reference.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=r"--reference .*reference\.txt"):
        experiment.run(settings_in(world, reference=str(path)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_another_run_is_left_alone(finished):
    out, _, settings = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    other = Settings(**{**vars(settings), "seed": 5, "steps": 4})
    with pytest.raises(
        experiment.FolderError, match=r"another run \(it differs in seed: 0 there, 5 now; steps: 3 there, 4 now\)"
    ):
        experiment.run(other, out)
    assert experiment.run(settings, out) == finished[1], "a finished run is reported again"
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_a_folder_of_something_else_is_left_alone(world, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(experiment.FolderError, match="is not empty"):
        experiment.run(settings_in(world), tmp_path)
    with pytest.raises(experiment.FolderError, match="is a file"):
        experiment.run(settings_in(world), tmp_path / "mine.txt")


def test_embedded_domains_are_the_default():
    assert Settings().domains == DOMAINS
    assert Settings().methods == tuple(METHODS)
    assert Settings().lr_of("adamw") == AdamW.default_lr


def test_the_real_data_and_a_real_model(shared_folder, tmp_path):
    reference = tmp_path / "reference.txt"
    reference.write_text((shared_folder / "data" / "base.test.txt").read_text()[:2000])
    settings = Settings(
        model=str(shared_folder / "models" / "stories260k"),
        data=str(shared_folder / "data"),
        domains=("code", "general"),
        reference=str(reference),
        methods=("lora", "sparse-masked"),
        steps=2,
        batch_size=16,
        eval_records=2,
        max_length=64,
    )
    runs = experiment.run(settings, tmp_path / "out")
    assert [run["R"]["bits_per_byte"][-1][-1] > 0 for run in runs] == [True, True]
