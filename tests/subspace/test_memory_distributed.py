"""Processes that see different inputs end up with the bases of one that sees them all."""

import pytest
import torch
import torch.distributed as dist
from cases.forked import start_two
from torch import nn

from sparse_cl import SubspaceMemory

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def remember(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1100, 20), nn.ReLU(), nn.Linear(20, 8))
    memory = SubspaceMemory(model, max_rank=12, energy=0.9, source="inputs")
    for batch in batches:
        with torch.no_grad(), memory.watch():
            model(batch)
        memory.observe()
    memory.consolidate()
    return memory


def inputs():
    rng = torch.Generator().manual_seed(1)
    return list(torch.randn(4, 16, 1100, generator=rng) * 0.8 ** torch.arange(1100))


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    remember(inputs()[rank::2]).save(f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path):
    start_two(work, tmp_path)
    first, second = (SubspaceMemory.load(tmp_path / f"{rank}.safetensors") for rank in range(2))
    alone = remember(inputs())
    for name in alone.names:
        assert torch.equal(first.basis(name), second.basis(name))
        assert first.rank(name) == alone.rank(name) > 0
        overlap = torch.linalg.svdvals(first.basis(name).mT @ alone.basis(name))
        assert torch.allclose(overlap, torch.ones_like(overlap), atol=1e-5)
