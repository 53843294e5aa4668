"""`sparse-cl learn --shard` in two processes: one call of one process with twice the batch."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.distributed as dist
import transformers
from cases.forked import start
from cases.world import write_world
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sparse_cl.cli import main
from sparse_cl.learn.domain import learn
from sparse_cl.learn.settings import LearnSettings
from sparse_cl.methods.carried import load_carried

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

SHORT = {"steps": 4, "max_length": 48, "texts": 4, "lr": 5e-3}
#: Methods, with the option of each that is tried, and the model that they begin with.
LEARNED = {"elastic": ("model", "every=2"), "orthogonal": ("tied", "max_rank=4"), "adamw": ("tied", "")}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    world = write_world(tmp_path_factory.mktemp("world"), tokenizer)
    for name in ("code", "math"):
        lines = (world / "data" / f"{name}.train.jsonl").read_text().splitlines()
        kept = ({key: json.loads(line)[key] for key in ("prompt", "response")} for line in lines[:40])
        (world / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    shutil.copytree(world / "model", world / "tied")
    config = transformers.AutoConfig.from_pretrained(world / "model", tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(world / "tied")
    return world


def settings(world, model, data, out, **others):
    given = {"model": str(world / model), "data": (str(world / f"{data}.jsonl"),), "out": world / out}
    return LearnSettings(**{**SHORT, **given, **others})


def two_domains(world, where, **others):
    """By each method; what is said."""
    said = []
    for method, (model, option) in LEARNED.items():
        given = {"method": method, "set": (option,) if option else (), **others}
        learn(settings(world, model, "code", f"{where}-1-{method}", **given), said.append)
        learn(settings(world, f"{where}-1-{method}", "math", f"{where}-2-{method}", **given), said.append)
    return said


def work(world):
    said = two_domains(world, "two", batch_size=2, shard=True)
    (world / f"said-{dist.get_rank()}.json").write_text(json.dumps(said))
    return 0


def launch(world, logs):
    """`torchrun --standalone --nproc-per-node 2`, but that the two are forked: nothing is imported again."""
    logs = DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL)
    meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(1, 1, nproc_per_node=2, start_method="fork", max_restarts=0, logs_specs=logs, **meeting)
    return max(elastic_launch(config, work)(world).values())


@pytest.fixture(scope="module")
def learned(world, tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    launcher = start(launch, world, logs, ACCELERATE_USE_CPU="1")
    two_domains(world, "one", batch_size=4)
    launcher.join(120)
    assert launcher.exitcode == 0, "".join(file.read_text()[-4000:] for file in logs.rglob("stderr.log"))
    return world


@pytest.mark.parametrize("method", LEARNED)
def test_two_processes_learn_what_one_learns(learned, method):
    for number in (1, 2):
        one, two = (learned / f"{where}-{number}-{method}" for where in ("one", "two"))
        models = [transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (one, two)]
        expected, found = (model.state_dict() for model in models)
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-4, msg=lambda m, n=name: n + m)
        entries = [load_carried(folder).domains[-1] for folder in (one, two)]
        for when in ("before", "after"):
            assert entries[1]["loss"][when] == pytest.approx(entries[0]["loss"][when], abs=1e-4)
        assert entries[0]["loss"]["after"] < entries[0]["loss"]["before"], "it learned"
