"""Critical sparsity where it is known, and against dropping by hand."""

import json

import pytest
import torch
from torch import nn

from sparse_cl.probes.critical_sparsity import critical_sparsity


class Summed(nn.Module):
    """Activations are the inputs; the output is their weighted sum."""

    def __init__(self, width):
        super().__init__()
        self.out = nn.Linear(width, 1, bias=False).double()
        nn.init.ones_(self.out.weight)

    def forward(self, values):
        return self.out(values)


def lost(target):
    """A loss that grows by the share of the sum that is missing."""
    return lambda model, batch: ((1 + (target - model(batch)).abs()).sum(), len(batch))


@pytest.mark.parametrize("needed", [5, 40, 93])
def test_neurons_that_do_nothing_can_be_dropped_and_no_others(needed):
    model = Summed(100)
    batches = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        values = torch.full((8, 100), 1e-9, dtype=torch.float64)
        places = torch.rand(8, 100, generator=generator).argsort(1)[:, :needed]  # others in each row
        batches.append(values.scatter(1, places, 1.0))
    found = critical_sparsity(model, batches, 0.01, modules=[model.out], loss=lost(needed))
    assert 1 - needed / 100 - 0.01 <= found.share <= 1 - needed / 100 + 0.01
    assert found.base == pytest.approx(1, abs=1e-6)
    assert found.tokens == 48
    assert not model.out._forward_pre_hooks


def test_the_curve_is_that_of_dropping_by_hand(tiny_llama, tokenizer):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, len(tokenizer), (3, 4, 12), generator=generator)
    batches = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i} for i in ids]
    tiny_llama.train()
    found = critical_sparsity(tiny_llama, batches, 0.02, tolerance=0.1)
    assert tiny_llama.training
    assert not any(m._forward_pre_hooks for m in tiny_llama.modules())
    tiny_llama.eval()

    def forward(mlp, share):
        def replaced(x):
            a = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
            dropped = a.abs().argsort(-1)[..., : int(share * 24)]
            return mlp.down_proj(a.scatter(-1, dropped, 0.0))

        return replaced

    for share, loss in found.curve:
        for layer in tiny_llama.model.layers:
            layer.mlp.forward = forward(layer.mlp, share)
        with torch.no_grad():
            # All sequences are of one length, so the mean of means is the mean over tokens.
            losses = [float(tiny_llama(input_ids=i, labels=i).loss) for i in ids]
        assert loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    for layer in tiny_llama.model.layers:
        del layer.mlp.forward
    below = [loss for share, loss in found.curve if share == found.share]
    assert below[0] <= found.base * 1.02
    above = min((share for share, loss in found.curve if share > found.share), default=None)
    assert above is None or dict(found.curve)[above] > found.base * 1.02
    json.dumps(found.to_json(), allow_nan=False)


def test_the_interval_is_of_batches_and_there_is_none_for_one():
    model = Summed(50)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(4, 50, generator=generator, dtype=torch.float64) for _ in range(12)]

    def loss(model, batch):
        return (1 + (batch.sum(1, keepdim=True) - model(batch)).abs() / batch.sum(1, keepdim=True)).sum(), len(batch)

    found = critical_sparsity(model, batches, 0.05, modules=[model.out], loss=loss)
    low, high = found.interval
    assert low <= found.share + 0.02 and found.share - 0.02 <= high and 0 < high - low < 0.1
    assert critical_sparsity(model, batches[:1], 0.05, modules=[model.out], loss=loss).interval is None


def test_a_failing_loss_leaves_the_model_as_it_was(tiny_llama):
    tiny_llama.train()

    def failing(model, batch):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        critical_sparsity(tiny_llama, [None], loss=failing)
    assert tiny_llama.training
    assert not any(m._forward_pre_hooks for m in tiny_llama.modules())


def test_bad_input_is_named(tiny_llama):
    with pytest.raises(ValueError, match="increase: expected a rise above 0, got 0"):
        critical_sparsity(tiny_llama, [], 0)
    with pytest.raises(ValueError, match=r"tolerance: expected a share in \(0, 1\), got 1"):
        critical_sparsity(tiny_llama, [], tolerance=1)
    with pytest.raises(ValueError, match="gone through again and again"):
        critical_sparsity(tiny_llama, iter([]))
    with pytest.raises(ValueError, match="is the domain empty"):
        critical_sparsity(tiny_llama, [])
