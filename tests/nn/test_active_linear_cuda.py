"""ActiveLinear on a GPU: its gradient beside the dense formula in float64, steps, autocast, checkpointing, moves."""

import copy

import pytest
import torch
from cases.adamw import bits
from cases.cuda_device import DEVICE, ON_GPU, captured, needs_device, no_waiting, random
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparse_cl import ColumnMask, RowMask, SparseMaskedAdamW
from sparse_cl.nn import ActiveLinear

pytestmark = needs_device

OUT, IN = 96, 136
MASKS = {"rows": RowMask([2, 95, 40, 3, 17], (OUT, IN)), "columns": ColumnMask([0, 135, 64, 65, 7, 9], (OUT, IN))}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Relative errors of a product of this size: rounding, and in bfloat16 that of what goes in and comes out.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}

by_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def layer_of(mask, dtype, device=DEVICE, **options):
    layer = ActiveLinear(IN, OUT, device=device, dtype=dtype, mask=mask, **options)
    with torch.no_grad():
        layer.weight.copy_(random(OUT, IN) / IN**0.5)
        layer.bias.copy_(random(OUT, seed=1))
    layer.refresh()
    return layer


def part(mask, whole):
    """The compact entries of a whole matrix on the CPU."""
    index = mask.index.long().cpu()
    return whole[index] if isinstance(mask, RowMask) else whole[:, index]


def error(got, exact):
    return float((got.detach().cpu().double() - exact).norm() / exact.norm())


def assert_consistent(layer):
    """The weight's active part is its leaf, rounded."""
    mine = part(layer.mask, layer.weight.detach().cpu())
    assert torch.equal(mine, layer.active.detach().cpu().to(mine.dtype))


@by_mask
@by_dtype
def test_gradients_are_those_of_the_dense_formula(mask, dtype):
    layer = layer_of(mask, dtype)
    layer.bias.requires_grad_(True)
    x = random(3, 50, IN, seed=2).to(DEVICE, dtype).requires_grad_()
    grad = random(3, 50, OUT, seed=3).to(DEVICE, dtype)
    y = layer(x)
    y.backward(grad)
    weight, inputs, above = (t.detach().cpu().double() for t in (layer.weight, x, grad))
    inputs, above = inputs.flatten(0, 1), above.flatten(0, 1)
    tolerance = TOLERANCE[dtype]
    assert error(y.flatten(0, 1), inputs @ weight.mT + layer.bias.detach().cpu().double()) <= tolerance
    assert error(x.grad.flatten(0, 1), above @ weight) <= tolerance
    assert error(layer.bias.grad, above.sum(0)) <= tolerance
    assert layer.weight.grad is None
    assert layer.active.grad.dtype == layer.active.dtype == torch.float32
    assert error(layer.active.grad, part(mask, above.mT @ inputs)) <= tolerance


@by_mask
def test_autocast(mask):
    layer = layer_of(mask, torch.float32)
    x, grad = random(40, IN, seed=2), random(40, OUT, seed=3)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = layer(x.to(DEVICE))
    assert y.dtype == torch.bfloat16
    y.backward(grad.to(DEVICE, torch.bfloat16))
    assert layer.active.grad.dtype == torch.float32
    assert error(layer.active.grad, part(mask, grad.double().mT @ x.double())) <= TOLERANCE[torch.bfloat16]


@by_mask
@by_dtype
def test_checkpointing_gives_the_same_gradients(mask, dtype):
    model = nn.Sequential(
        layer_of(mask, dtype), nn.LeakyReLU(inplace=True), nn.Linear(OUT, IN, device=DEVICE, dtype=dtype)
    )
    x = random(20, IN, seed=2).to(DEVICE, dtype)
    found = []
    for forward in (model, lambda batch: checkpoint(model, batch, use_reentrant=False)):
        model.zero_grad()
        forward(x).float().square().mean().backward()
        found.append(model[0].active.grad.cpu().clone())
    torch.testing.assert_close(*found, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * float(found[0].abs().max()))


@by_mask
@by_dtype
def test_steps_write_the_leaf_rounded_into_the_weight(mask, dtype):
    """Beside steps on the CPU by the same gradients; the rest of the weight keeps its bits."""
    on_gpu, on_cpu = layer_of(mask, dtype), layer_of(mask, dtype, "cpu")
    optimizers = [SparseMaskedAdamW([layer.active], lr=0.01, weight_decay=0.1) for layer in (on_gpu, on_cpu)]
    start = on_gpu.weight.detach().cpu().clone()
    frozen = ~mask.to_dense()
    for step in range(5):
        for layer, optimizer in zip((on_gpu, on_cpu), optimizers, strict=True):
            grad = random(*layer.active.shape, seed=10 + step)
            layer.active.grad = grad.to(layer.active.device)
            if step and layer is on_gpu:
                with no_waiting():
                    optimizer.step()
            else:
                optimizer.step()
        after = on_gpu.weight.detach().cpu()
        assert_consistent(on_gpu)
        assert torch.equal(bits(after[frozen]), bits(start[frozen]))
        torch.testing.assert_close(on_gpu.active.detach().cpu(), on_cpu.active.detach(), rtol=1e-5, atol=1e-6)
    assert (after != start)[~frozen].float().mean() > 0.9
    # One tensor under two names.
    assert optimizers[0].state[on_gpu.active]["master"].data_ptr() == on_gpu.active.data_ptr()
    assert on_gpu.active.device == on_gpu.weight.device == DEVICE


@by_mask
def test_a_leaf_in_half_precision_follows_the_weight(mask):
    layer = layer_of(mask, torch.bfloat16, leaf_dtype=torch.bfloat16)
    optimizer = SparseMaskedAdamW([layer.active], lr=0.01, master_weights=False)
    for step in range(3):
        layer.active.grad = random(*layer.active.shape, seed=step).to(DEVICE, torch.bfloat16)
        optimizer.step()
        assert_consistent(layer)


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@by_mask
def test_a_whole_step_is_captured(mask):
    """Forward, backward and step in one graph, as often as it is replayed."""
    eager, graphed = (layer_of(mask, torch.bfloat16) for _ in range(2))
    x, target = (random(32, size, seed=size).to(DEVICE, torch.bfloat16) for size in (IN, OUT))

    def whole_step(layer, optimizer):
        def run():
            layer.active.grad = None
            (layer(x) - target).float().square().mean().backward()
            optimizer.step()

        return run

    runs = [
        whole_step(layer, SparseMaskedAdamW([layer.active], lr=0.01, capturable=True)) for layer in (eager, graphed)
    ]
    if ON_GPU:
        # As torch asks: what autograd and cuBLAS make at first is made on a side stream.
        stream = torch.cuda.Stream(DEVICE)
        stream.wait_stream(torch.cuda.current_stream(DEVICE))
        with torch.cuda.stream(stream):
            runs[1]()
        torch.cuda.current_stream(DEVICE).wait_stream(stream)
    else:
        runs[1]()
    runs[0]()
    start = graphed.active.detach().clone()
    replay = captured(runs[1])
    for _ in range(3):
        replay()
        runs[0]()
        assert_consistent(graphed)
    # Products may be summed in another order; a step too many would be off by a third.
    assert (graphed.active - eager.active).norm() <= 0.02 * (eager.active - start).norm()


@by_mask
def test_a_layer_that_moves_takes_its_leaf_along(mask):
    stays = layer_of(mask, torch.float32, "cpu")
    moves = copy.deepcopy(stays)
    optimizers = [SparseMaskedAdamW([("active", layer.active)], lr=0.01) for layer in (stays, moves)]

    def train(layer, optimizer, seed):
        optimizer.zero_grad()
        layer(random(20, IN, seed=seed).to(layer.weight.device)).square().mean().backward()
        optimizer.step()

    for layer, optimizer in zip((stays, moves), optimizers, strict=True):
        train(layer, optimizer, 1)
    moves.to(DEVICE)
    assert moves.active.device == moves.mask.device == DEVICE
    if ON_GPU:
        before = moves.active.detach().clone()
        with pytest.raises(ValueError, match="'active': its state is on cpu, expected cuda"):
            train(moves, optimizers[1], 2)
        assert moves.active.device == DEVICE
        assert torch.equal(moves.active, before)
        assert_consistent(moves)
    optimizers[1].load_state_dict(optimizers[1].state_dict())
    for seed in (2, 3):
        for layer, optimizer in zip((stays, moves), optimizers, strict=True):
            train(layer, optimizer, seed)
    assert_consistent(moves)
    torch.testing.assert_close(moves.weight.detach().cpu(), stays.weight.detach(), rtol=1e-4, atol=1e-5)
