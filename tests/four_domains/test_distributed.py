"""A sequence in several processes: one run, that of one process with as many times the batch."""

from __future__ import annotations

import json

import pytest
import torch
from cases.forked import start
from cases.world import write_world
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sparse_cl.cli import main

METHODS = ("adamw", "lora", "elastic")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    return write_world(tmp_path_factory.mktemp("world"), tokenizer)


def arguments(world, out, batch_size):
    return [
        *("run", "--model", str(world / "model"), "--data", str(world / "data"), "--domains", "code,math"),
        *("--method", ",".join(METHODS), "--steps", "3", "--max-length", "32", "--eval-records", "4"),
        *("--batch-size", str(batch_size), "--metrics", "bits_per_byte", "--out", str(out)),
    ]


def results(out):
    return json.loads((out / "results.json").read_text())["runs"]


def launch(arguments, logs):
    """`torchrun --standalone --nproc-per-node 2`, but that the two are forked: nothing is imported again."""
    logs = DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL)
    meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(1, 1, nproc_per_node=2, start_method="fork", logs_specs=logs, **meeting)
    return max(elastic_launch(config, main)(arguments).values())


def test_two_processes_are_one_run_with_twice_the_batch(world, tmp_path):
    launcher = start(launch, arguments(world, world / "two", 2), tmp_path, ACCELERATE_USE_CPU="1")
    assert main(arguments(world, world / "one", 4)) == 0
    launcher.join(120)
    assert launcher.exitcode == 0
    assert "".join(file.read_text() for file in tmp_path.rglob("stdout.log")).count("Written to") == 1
    for one, two in zip(results(world / "one"), results(world / "two"), strict=True):
        single, both = (torch.tensor(run["R"]["bits_per_byte"], dtype=torch.float64) for run in (one, two))
        assert (single[1:] - single[0]).abs().max() > 0.05, "it learned"
        torch.testing.assert_close(both, single, rtol=0, atol=1e-3)


def test_processes_that_do_not_know_of_each_other_are_refused(world, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments(world, world / "none", 2)) == 2
    assert "2 processes were started (WORLD_SIZE), but accelerate knows of 1" in capsys.readouterr().err
    assert not (world / "none").exists()
