"""A run that is killed at any moment, and started again by the same command, ends with the same results.json.

`SPARSE_CL_KILLS=300 pytest tests/four_domains/test_kill.py` kills more often, and all methods.
"""

from __future__ import annotations

import os

from cases.killed import killed, run, undisturbed
from cases.world import write_world

from sparse_cl.methods import METHODS

KILLS = int(os.environ.get("SPARSE_CL_KILLS", "4"))
LEARNERS = ("lora", "orthogonal") if KILLS <= 20 else tuple(METHODS)


def test_kills_at_random_moments_change_no_bit(tmp_path, tokenizer):
    world = write_world(tmp_path / "world", tokenizer)
    (world / "text.txt").write_text("Once upon a time there was a text. " * 20)
    arguments = ["run", "--model", world / "model", "--data", world / "data", "--domains", "code,math"]
    arguments += ["--method", ",".join(LEARNERS), "--steps", "2", "--batch-size", "16", "--max-length", "32"]
    arguments += ["--eval-records", "2", "--metrics", "bits_per_byte", "--reference", world / "text.txt", "--out"]

    run([*arguments, tmp_path / "first"])  # the server imports before it serves, and files are read for the first time
    whole = undisturbed([*arguments, tmp_path / "undisturbed"])
    expected = (tmp_path / "undisturbed" / "results.json").read_bytes()

    def late(number):
        return any((tmp_path / f"chain-{number}").glob("*/*-*/complete.json"))

    chain = -1
    for chain in killed(KILLS, whole, lambda number: [[*arguments, tmp_path / f"chain-{number}"]], late):
        out = tmp_path / f"chain-{chain}"
        assert (out / "results.json").read_bytes() == expected
        left = [path.name for path in out.rglob("*") if path.name == "unfinished" or path.suffix == ".part"]
        assert not left
    assert chain >= 0
