"""Processes that see different inputs end up with the bases of one that sees them all."""

import pytest
import torch
import torch.distributed as dist
from cases.forked import start_two
from torch import nn

from sparse_cl import SubspaceMemory

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


class Net(nn.Sequential):
    """With a table, and a layer that only some batches reach."""

    def __init__(self):
        super().__init__(nn.Linear(1100, 20), nn.ReLU(), nn.Linear(20, 8))
        self.table, self.rare = nn.Embedding(30, 20), nn.Linear(8, 5)

    def forward(self, x):
        y = super().forward(x) if x.dim() == 2 else self[2](self.table(x))
        return self.rare(y) if x.dim() == 1 else y

    def __iter__(self):
        return iter([self[0], self[1], self[2]])


def remember(batches, shard=False):
    torch.manual_seed(0)
    model = Net()
    if shard:
        from torch.distributed.fsdp import fully_shard

        for part in (model[0], model.table, model):
            fully_shard(part)
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


def lookups():
    return torch.randint(0, 30, (40,), generator=torch.Generator().manual_seed(2))


def work(rank, folder, shard):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    # Without shards, which every process has to gather, only the first one looks anything up.
    own = [lookups()[20 * rank :][:20]] if shard else [lookups()][rank:]
    remember([*inputs()[rank::2], *own], shard).save(f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.parametrize("shard", [False, True], ids=["", "fully_shard"])
def test_two_processes_agree_with_one(tmp_path, shard):
    start_two(work, tmp_path, shard)
    first, second = (SubspaceMemory.load(tmp_path / f"{rank}.safetensors") for rank in range(2))
    alone = remember([*inputs(), lookups()])
    assert alone.rank("rare.weight")
    for memory in (first, second):
        rows, expected = (m.used_rows("table.weight") for m in (memory, alone))
        assert torch.equal(rows.index, expected.index)
        torch.testing.assert_close(rows.values, expected.values)
    for name in alone.names:
        assert torch.equal(first.basis(name), second.basis(name))
        assert first.rank(name) == alone.rank(name) > 0
        overlap = torch.linalg.svdvals(first.basis(name).mT @ alone.basis(name))
        assert torch.allclose(overlap, torch.ones_like(overlap), atol=1e-5)
