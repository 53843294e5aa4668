"""A model that FSDP2 splits over processes that are not there: what one of them holds and sends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed

_COLLECTIVES = ("c10d", "_c10d_functional")
GATHERS = ("_allgather_base_", "split_with_sizes_copy")
"""Ops by which FSDP2 gathers weights: into a buffer, their first argument, and from it into the tensors of "out"."""


@contextmanager
def imagined(gpus: int) -> Iterator[Any]:
    """The mesh of ``gpus`` processes, of which this is the first and the others do nothing; of one process, None.

    Objects that processes exchange are the same in all of them.
    """
    if gpus == 1:
        yield None
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def exchange(found: list[Any], value: Any, group: Any = None) -> None:
        found[:] = [value] * len(found)

    distributed.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        with (
            mock.patch.object(distributed, "all_gather_object", exchange),
            mock.patch.object(distributed, "broadcast_object_list", lambda told: None),
        ):
            yield init_device_mesh("cpu", (gpus,))
    finally:
        distributed.destroy_process_group()


def policy(precision: str) -> Any:
    """FSDP2's: "mixed" gathers weights in bfloat16 and reduces gradients in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision == "mixed" else MixedPrecisionPolicy()


def sent(func: Any, tensors: Iterable[Tensor]) -> int:
    """Bytes that a process sends in an op, if that is a collective.

    Processes in a ring pass on all of the longest tensor but their own part; to add one up and to return it takes two
    rounds.

    Args:
        tensors: given and made.
    """
    if func.namespace not in _COLLECTIVES or "wait" in func._opname:
        return 0
    processes = distributed.get_world_size()
    rounds = 2 if "allreduce" in func._opname or "all_reduce" in func._opname else 1
    return rounds * max(x.nbytes for x in tensors) * (processes - 1) // processes
