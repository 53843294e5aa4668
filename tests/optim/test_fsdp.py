"""SparseMaskedAdamW of parameters that FSDP2, HSDP or tensor parallelism has split."""

from __future__ import annotations

import pytest
from cases import fsdp_checkpoints, fsdp_models, fsdp_steps
from cases.sharded import assert_passed, make_all, outcomes, start

PROCESSES = 4
CHECKS = {check.__name__: check for part in (fsdp_steps, fsdp_checkpoints, fsdp_models) for check in part.CHECKS}


def work(rank, folder):
    make_all(rank, PROCESSES, folder, CHECKS)
    fsdp_checkpoints.save_whole_and_torn(folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    assert start(work, PROCESSES, folder) != 0, "one process was killed"
    return folder


@pytest.mark.parametrize("name", CHECKS)
def test_four_processes(found, name):
    assert_passed(outcomes(found, PROCESSES), name)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_process_is_killed_in_a_save_and_the_last_whole_checkpoint_loads(found):
    fsdp_checkpoints.reads_whole_and_torn(found)
