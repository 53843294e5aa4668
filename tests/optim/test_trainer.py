"""SparseMaskedAdamW inside the HF Trainer."""

import signal

import pytest
import torch
from cases.forked import exit_code
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def run(folder, dtype, die_at=None, resume=False):
    from cases.trainer_job import job

    return exit_code(job, folder, dtype, die_at, resume)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_killed_and_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, dtype):
    """With gradient accumulation, bf16 autocast, a warm-up schedule, masks and gains."""
    assert run(tmp_path / "whole", dtype) == 0
    assert run(tmp_path / "killed", dtype, die_at=7) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "final").exists()
    assert run(tmp_path / "killed", dtype, resume=True) == 0

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
