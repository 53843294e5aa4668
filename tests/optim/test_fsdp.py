"""SparseMaskedAdamW of parameters that FSDP2, HSDP or tensor parallelism has split, ActiveLinear, and adapters."""

from __future__ import annotations

import pytest
from cases import fsdp_active, fsdp_adapters, fsdp_checkpoints, fsdp_flattened, fsdp_models, fsdp_steps
from cases.sharded import make_all, outcomes, start

PROCESSES = 4
PARTS = (fsdp_steps, fsdp_checkpoints, fsdp_models, fsdp_active, fsdp_adapters, fsdp_flattened)
CHECKS = {check.__name__: check for part in PARTS for check in part.CHECKS}


def work(rank, folder):
    make_all(rank, PROCESSES, folder, CHECKS)
    fsdp_checkpoints.save_whole_and_torn(folder)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_four_processes(tmp_path):
    # One test, since several would start the processes in each worker of pytest that runs some of them.
    assert start(work, PROCESSES, tmp_path) != 0, "one process was killed"
    for rank, became in enumerate(outcomes(tmp_path, PROCESSES)):
        for name in CHECKS:
            outcome = became.get(name, "not reached")
            assert outcome == "passed", f"{name} in process {rank}: {outcome}"
    fsdp_checkpoints.reads_whole_and_torn(tmp_path)
    fsdp_adapters.one_process_learned_the_same(tmp_path)
