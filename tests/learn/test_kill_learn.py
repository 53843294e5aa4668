"""Two domains learned by calls that are killed at any moment, and given again: the models are the same bits."""

from __future__ import annotations

import os

import safetensors.torch
import torch
from cases.killed import killed, run, undisturbed
from cases.world import write_world

KILLS = int(os.environ.get("SPARSE_CL_KILLS", "4"))


def test_kills_at_random_moments_change_no_bit(tmp_path, tokenizer):
    world = write_world(tmp_path / "world", tokenizer)

    def learn(model, data, out):
        given = ["learn", "--model", model, "--data", world / "data" / f"{data}.train.jsonl", "--out", out]
        return [*given, "--steps", "6", "--batch-size", "4", "--max-length", "48", "--texts", "4", "--lr", "5e-3"]

    def both(name):
        first, second = tmp_path / f"{name}-1", tmp_path / f"{name}-2"
        return [learn(world / "model", "code", first), learn(first, "math", second)]

    run(learn(world / "model", "code", tmp_path / "first"))  # the server imports before it serves
    whole = undisturbed(*both("undisturbed")) / 2
    chain = -1
    for chain in killed(KILLS, whole, lambda number: both(str(number))):
        for number in (1, 2):
            for file in ("model.safetensors", "sparse_cl/memory.safetensors"):
                expected, found = (
                    safetensors.torch.load_file(tmp_path / f"{name}-{number}" / file)
                    for name in ("undisturbed", str(chain))
                )
                assert all(torch.equal(expected[name], found[name]) for name in expected)
            assert not (tmp_path / f"{chain}-{number}" / "unfinished").exists()
    assert chain >= 0
