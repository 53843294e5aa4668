"""A run that is killed at any moment, and started again by the same command, ends with the same results.json.

`SPARSE_CL_KILLS=300 pytest tests/four_domains/test_kill.py` kills more often, and all methods.
"""

from __future__ import annotations

import os
import random
import time

from cases.forked import start
from cases.world import write_world

from sparse_cl.cli import main
from sparse_cl.methods import METHODS

KILLS = int(os.environ.get("SPARSE_CL_KILLS", "8"))
LEARNERS = ("lora", "orthogonal") if KILLS <= 20 else tuple(METHODS)


def test_kills_at_random_moments_change_no_bit(tmp_path, tokenizer):
    world = write_world(tmp_path / "world", tokenizer)
    (world / "text.txt").write_text("Once upon a time there was a text. " * 20)
    arguments = ["run", "--model", str(world / "model"), "--data", str(world / "data"), "--domains", "code,math"]
    arguments += ["--method", ",".join(LEARNERS), "--steps", "2", "--batch-size", "16", "--max-length", "32"]
    arguments += ["--eval-records", "2", "--metrics", "bits_per_byte", "--reference", str(world / "text.txt"), "--out"]

    def run(out, seconds=None):
        """Whether it was killed, having run for so many seconds."""
        process = start(main, [*arguments, str(out)], TOKENIZERS_PARALLELISM="false")
        process.join(seconds)
        killed = process.is_alive()
        if killed:
            process.kill()
            process.join()
        else:
            assert process.exitcode == 0
        process.close()
        return killed

    run(tmp_path / "first")  # the server imports before it serves, and files are read for the first time
    began = time.monotonic()
    run(tmp_path / "undisturbed")
    whole = time.monotonic() - began
    expected = (tmp_path / "undisturbed" / "results.json").read_bytes()

    moments, kills, chain, trained_before_a_kill = random.Random(0), 0, 0, set()
    while kills < KILLS:
        out = tmp_path / f"chain-{chain}"
        while kills < KILLS and run(out, moments.uniform(0, whole)):
            kills += 1
            trained_before_a_kill |= {path.parent.name for path in out.glob("*/*-*/complete.json")}
        run(out)
        assert (out / "results.json").read_bytes() == expected
        left = [path.name for path in out.rglob("*") if path.name == "unfinished" or path.suffix == ".part"]
        assert not left
        chain += 1
    assert chain > 1 and trained_before_a_kill, "kills came early and late"
