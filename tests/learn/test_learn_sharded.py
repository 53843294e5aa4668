"""`sparse-cl learn --shard` in two processes: one call of one process with twice the batch."""

from __future__ import annotations

import json
import os

import pytest
import torch
import torch.distributed as dist
import transformers
from cases.forked import start
from cases.world import write_world
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sparse_cl.cli import main
from sparse_cl.layout import is_split
from sparse_cl.learn import work as work_module
from sparse_cl.learn.domain import learn
from sparse_cl.learn.settings import LearnSettings
from sparse_cl.methods.carried import load_carried
from sparse_cl.models.sharding import split_over_all

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

SHORT = {"steps": 4, "max_length": 16, "texts": 2, "lr": 5e-3, "trainer": ("save_steps=3",)}
#: What is learned, by its folder: of which model, what, and how. Each is a domain after those that it names.
CALLS = {
    "1-elastic": ("model", "code", {"method": "elastic"}),
    "2-elastic": ("1-elastic", "math", {"method": "elastic", "set": ("every=2",)}),
    "2-orthogonal": ("1-elastic", "math", {"method": "orthogonal", "set": ("source=inputs",)}),
    "1-adapter": ("model", "code", {"method": "elastic-lora", "lr": 2e-2}),
    "2-adapter": ("1-adapter", "math", {"method": "elastic-lora", "lr": 2e-2}),
    "2-apart": ("1-adapter", "math", {"method": "orthogonal-lora", "lr": 2e-2, "steps": 2}),
    "2-plain": ("1-adapter", "code", {"method": "lora", "lr": 5e-3, "steps": 2}),
    "tied": ("tied-model", "math", {"method": "adamw", "gradient_accumulation": 2, "steps": 2}),
}
#: Those that are also stopped on their way, and made by one process from what several left.
CUT = ("2-elastic", "2-adapter")


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    world = write_world(tmp_path_factory.mktemp("world"), tokenizer)
    for name in ("code", "math"):
        lines = (world / "data" / f"{name}.train.jsonl").read_text().splitlines()
        kept = ({key: json.loads(line)[key] for key in ("prompt", "response")} for line in lines[:9])
        (world / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    for name, tied in (("model", False), ("tied-model", True)):
        options = {"num_hidden_layers": 1, "tie_word_embeddings": tied, "layer_types": None}
        config = transformers.AutoConfig.from_pretrained(world / "model", **options)
        transformers.LlamaForCausalLM(config).save_pretrained(world / name)
        tokenizer.save_pretrained(world / name)
    return world


def settings(world, where, call, **others):
    model, data, given = CALLS[call]
    model = world / model if "model" in model else world / where / model
    paths = {"model": str(model), "data": (str(world / f"{data}.jsonl"),), "out": world / where / call}
    return LearnSettings(**{**SHORT, **paths, **given, **others})


def work(world):
    """In each of two processes."""
    rank, said, sharded = int(os.environ["RANK"]), [], {"batch_size": 2, "shard": True}
    for out in CALLS:
        learn(settings(world, "two", out, **sharded), said.append)
    (world / f"said-{rank}.json").write_text(json.dumps(said))

    on_save = work_module._Marker.on_save

    def stop(self, args, state, control, **kwargs):
        on_save(self, args, state, control, **kwargs)
        assert all(is_split(param, 0) for param in kwargs["model"].parameters())
        raise Stopped

    for call in CUT:
        cut = {**sharded, "out": world / "two" / f"cut-{call}"}
        work_module._Marker.on_save = stop
        with pytest.raises(Stopped):
            learn(settings(world, "two", call, **cut))
        work_module._Marker.on_save = on_save
        learn(settings(world, "two", call, **cut))

    refused = {
        "add --shard, which splits": {"shard": False},
        r"the processes do not read the same \(they differ in .*seed: [01] there, [01] now": {"seed": rank},
        "is a file; --out must be a folder": {"out": world / "code.jsonl"},
    }
    for message, others in refused.items():
        with pytest.raises(ValueError, match=message):
            learn(settings(world, "two", "1-elastic", **{**sharded, "out": world / "refused", **others}))
    assert not (world / "refused").exists()
    with pytest.raises(ValueError, match="shard: weight has 1 rows, of which 2 processes cannot all hold some"):
        split_over_all(torch.nn.Linear(3, 1), torch.device("cpu"))
    return 0


def launch(world, logs):
    """`torchrun --standalone --nproc-per-node 2`, but that the two are forked: nothing is imported again."""
    import torch._dynamo  # noqa: F401 - DTensors bring it, and it takes longer than what is learned

    logs = DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL)
    meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(1, 1, nproc_per_node=2, start_method="fork", max_restarts=0, logs_specs=logs, **meeting)
    return max(elastic_launch(config, work)(world).values())


@pytest.fixture(scope="module")
def learned(world, tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    launcher = start(launch, world, logs, ACCELERATE_USE_CPU="1")
    for out in CALLS:
        learn(settings(world, "one", out, batch_size=4))
    launcher.join(120)
    assert launcher.exitcode == 0, "".join(file.read_text()[-4000:] for file in logs.rglob("error.json"))
    return world


def weights(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_same(found, expected, atol):
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=atol, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("out", CALLS)
def test_two_processes_learn_what_one_learns(learned, out):
    one, two = (learned / where / out for where in ("one", "two"))
    assert_same(weights(two), weights(one), 1e-4)
    entries = [load_carried(folder).domains[-1] for folder in (one, two)]
    for when in ("before", "after"):
        assert entries[1]["loss"][when] == pytest.approx(entries[0]["loss"][when], abs=1e-4)
    assert entries[0]["loss"]["after"] < entries[0]["loss"]["before"], "it learned"
    sizes = [{file.name: file.stat().st_size for file in folder.glob("*.safetensors")} for folder in (one, two)]
    assert sizes[0] == sizes[1] and sizes[0]
    assert not (two / "unfinished").exists()


def test_one_process_speaks(learned):
    said = [json.loads((learned / f"said-{rank}.json").read_text()) for rank in range(2)]
    assert sum(line.startswith("Written to") for line in said[0]) == len(CALLS)
    assert said[1] == []


@pytest.mark.parametrize("call", CUT)
def test_a_call_that_was_stopped_goes_on_to_the_same_weights(learned, call):
    assert_same(weights(learned / "two" / f"cut-{call}"), weights(learned / "two" / call), 1e-6)


@pytest.mark.parametrize("call", CUT)
def test_one_process_goes_on_from_what_several_left(learned, call):
    out = learned / f"alone-{call}"
    learn(settings(learned, "two", call, batch_size=4, out=out))
    assert_same(weights(out), weights(learned / "one" / call), 1e-4)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({}, "shard: expected several processes to split the model over, there is one; start them by torchrun"),
        ({"method": "elastic-lora", "merge": True}, "merge: no process holds the whole model.*leave --merge out"),
        ({"method": "orthogonal-masked"}, "shard: .*take --method elastic or orthogonal or adamw or elastic-lora"),
        ({"trainer": ("fsdp=full_shard",)}, "trainer: fsdp is --shard here"),
    ],
)
def test_what_cannot_be_split_is_refused(world, others, message):
    with pytest.raises(ValueError, match=message):
        learn(settings(world, "none", "1-elastic", **{"shard": True, **others}))
    assert not (world / "none").exists()


def test_the_command_says_what_several_processes_need(world, capsys):
    arguments = ["--model", str(world / "model"), "--data", str(world / "code.jsonl"), "--out", str(world / "none")]
    assert main(["learn", *arguments, "--shard"]) == 2
    assert "torchrun --nproc-per-node 2 -m sparse_cl learn" in capsys.readouterr().err
