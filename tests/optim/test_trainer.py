"""SparseMaskedAdamW inside the HF Trainer."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def run(folder, *options):
    job = Path(__file__).with_name("trainer_job.py")
    return subprocess.run([sys.executable, str(job), str(folder), *options], capture_output=True, text=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_killed_and_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, dtype):
    """With gradient accumulation, bf16 autocast, a warm-up schedule, masks and gains."""
    whole = run(tmp_path / "whole", "--param-dtype", dtype)
    assert whole.returncode == 0, whole.stderr
    killed = run(tmp_path / "killed", "--die-at", "7", "--param-dtype", dtype)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "final").exists()
    resumed = run(tmp_path / "killed", "--resume", "--param-dtype", dtype)
    assert resumed.returncode == 0, resumed.stderr

    expected = load_file(tmp_path / "whole" / "final" / "model.safetensors")
    actual = load_file(tmp_path / "killed" / "final" / "model.safetensors")
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name

    before = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    active = torch.zeros(64, dtype=torch.bool)
    active[::5] = True
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(before[name][~active], expected[name][~active])
    assert not torch.equal(before[name][active], expected[name][active])
