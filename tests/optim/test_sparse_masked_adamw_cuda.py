"""SparseMaskedAdamW on a GPU: torch's steps, frozen entries, masks that change, checkpoints, devices."""

import copy
import io

import pytest
import torch
from cases.adamw import bits
from cases.cuda_device import (
    DEVICE,
    ON_GPU,
    SHAPE,
    Model,
    assert_same,
    check_error,
    masks,
    needs_device,
    needs_two,
    no_waiting,
    random,
)
from torch import nn
from torch.optim import AdamW

from sparse_cl import RowMask, SparseMaskedAdamW

pytestmark = needs_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIONS = dict(lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)


def carried_by_file(state, location):
    """A state_dict as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location=location, weights_only=True)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_twenty_steps_are_as_near_to_the_oracle_as_torch_s_fused_ones(amsgrad):
    starts = [random(*shape, seed=i) for i, shape in enumerate([(257, 384), (1000,), (7, 5, 33)])]
    exact = [nn.Parameter(start.double()) for start in starts]
    fused = [nn.Parameter(start.to(DEVICE, copy=True)) for start in starts]
    mine = [nn.Parameter(start.to(DEVICE, copy=True)) for start in starts]
    options = OPTIONS | {"amsgrad": amsgrad}
    optimizers = [AdamW(exact, **options), AdamW(fused, fused=True, **options), SparseMaskedAdamW(mine, **options)]
    for step in range(20):
        for i, params in enumerate(zip(exact, fused, mine, strict=True)):
            grad = random(*starts[i].shape, seed=100 * step + i)
            for param in params:
                param.grad = grad.to(param.device, param.dtype)
        for optimizer in optimizers:
            optimizer.step()
    oracle, theirs, ours = (optimizer.state for optimizer in optimizers)
    for i, (e, f, m) in enumerate(zip(exact, fused, mine, strict=True)):
        check_error(m.detach().cpu(), f.detach().cpu(), e.detach(), f"parameter {i}")
        for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])):
            check_error(ours[m][name].cpu(), theirs[f][name].cpu(), oracle[e][name], f"{name} of parameter {i}")


@pytest.mark.parametrize("master", [True, False])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_frozen_entries_keep_their_bits_under_decay(dtype, master):
    model = Model(dtype, lr=0.1, weight_decay=0.5, master_weights=master)
    odd = torch.tensor([float("nan"), -0.0, float("inf"), torch.finfo(dtype).tiny / 2, torch.finfo(dtype).max])
    for name, written in model.written.items():
        where = model.frozen(name).view(-1).nonzero().view(-1)[: len(odd)]
        with torch.no_grad():
            written.view(-1)[where.to(DEVICE)] = odd[: len(where)].to(DEVICE, written.dtype)
    before = {name: written.detach().cpu().clone() for name, written in model.written.items()}
    for step in range(5):
        model.step(step)
    for name, written in model.written.items():
        frozen, after = model.frozen(name), written.detach().cpu()
        assert torch.equal(bits(after[frozen]), bits(before[name][frozen])), name
        moved = (after != before[name])[~frozen]
        assert moved.float().mean() > 0.9, name


def test_a_step_after_the_first_does_not_wait_for_the_gpu():
    model = Model(torch.bfloat16, lr=torch.tensor(0.1, device=DEVICE))
    plain = Model(torch.bfloat16, lr=0.1, master_weights=False)
    for each in (model, plain):
        each.step(0)
        each.give(1)
        with no_waiting():
            each.optimizer.step()
    assert all(int(state["step"]) == 2 for state in model.optimizer.state.values())


def test_which_parameters_have_a_gradient_may_change_without_waiting():
    """As with experts that are not used in each batch: what a step hands to the op is gathered anew."""
    model = Model(torch.bfloat16)
    model.step(0)
    model.params["rows"].grad = None
    with no_waiting():
        model.optimizer.step()
    assert int(model.optimizer.state[model.params["rows"]]["step"]) == 1
    assert int(model.optimizer.state[model.params["dense"]]["step"]) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_masks_change_as_on_the_cpu(dtype):
    on_gpu, on_cpu = Model(dtype), Model(dtype, "cpu")
    for step in range(3):
        on_gpu.step(step)
    for mine, theirs in zip(on_cpu.written.values(), on_gpu.written.values(), strict=True):
        mine.data.copy_(theirs)
    on_cpu.optimizer.load_state_dict(carried_by_file(on_gpu.optimizer.state_dict(), "cpu"))
    # Once within each kind, once from each kind to another, which leaves entries with counts of their own.
    others = masks(seed=1)
    kinds = list(others)
    for turn in (0, 2):
        new = {name: others[kinds[(i + turn) % len(kinds)]] for i, name in enumerate(kinds)}
        for model in (on_gpu, on_cpu):
            model.optimizer.set_masks({name: mask for name, mask in new.items() if mask is not None})
        assert_same(on_cpu.snapshot(), on_gpu.snapshot())
    for model in (on_gpu, on_cpu):
        model.step(7)
    for name, written in on_gpu.written.items():
        torch.testing.assert_close(written.detach().cpu(), on_cpu.written[name].detach())


@pytest.mark.parametrize("master", [True, False])
def test_state_passes_through_files_and_the_cpu_to_the_bit(master):
    first, second = (Model(torch.bfloat16, master_weights=master) for _ in range(2))
    on_cpu = Model(torch.bfloat16, "cpu", master_weights=master)
    for step in range(3):
        first.step(step)
    before = first.snapshot()
    for source, target in ((first, on_cpu), (on_cpu, second)):
        for mine, theirs in zip(target.written.values(), source.written.values(), strict=True):
            mine.data.copy_(theirs)
        target.optimizer.load_state_dict(carried_by_file(source.optimizer.state_dict(), target.device))
        assert_same(before, target.snapshot())
    assert {value.device for state in second.optimizer.state.values() for value in state.values()} == {DEVICE}
    for model in (first, second):
        model.step(5)
    assert_same(first.snapshot(), second.snapshot())


@pytest.mark.parametrize("fused", [False, True])
def test_goes_on_from_the_state_of_torch_s_adamw(fused):
    theirs, mine = (nn.Parameter(random(33, 20).to(DEVICE, copy=True)) for _ in range(2))
    expected = AdamW([theirs], fused=fused, **OPTIONS)
    optimizer = SparseMaskedAdamW([mine], **OPTIONS)
    for step in range(6):
        if step == 3:
            mine.data.copy_(theirs)
            optimizer.load_state_dict(carried_by_file(expected.state_dict(), DEVICE))
        for param in (theirs, mine):
            param.grad = random(33, 20, seed=step).to(DEVICE)
        expected.step()
        if step >= 3:
            optimizer.step()
    assert int(optimizer.state[mine]["step"]) == 6
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lr_on", ["float", "cpu", "device"])
def test_one_optimizer_of_parameters_on_the_cpu_and_on_a_gpu(lr_on):
    """Each is stepped where it is, to the same numbers, by a learning rate from anywhere."""
    mask = RowMask([0, 5, 23], SHAPE)
    params = [nn.Parameter(random(*SHAPE).to(place, copy=True)) for place in ("cpu", DEVICE, "cpu", DEVICE)]
    lr = 0.01 if lr_on == "float" else torch.tensor(0.01, device="cpu" if lr_on == "cpu" else DEVICE)
    optimizer = SparseMaskedAdamW(params, **OPTIONS | {"lr": lr}, masks={params[2]: mask, params[3]: mask})
    for step in range(3):
        for param in params:
            param.grad = random(*SHAPE, seed=step).to(param.device, copy=True)
        norm = optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    grad = random(*SHAPE, seed=2).double()
    expected = (2 * (grad.square().sum() + grad[mask.index.long()].square().sum())).sqrt()
    assert float(norm) == pytest.approx(float(expected), rel=1e-5)
    for on_cpu, on_gpu in (params[:2], params[2:]):
        assert on_gpu.device.type == DEVICE.type
        torch.testing.assert_close(on_cpu, on_gpu.cpu(), rtol=1e-5, atol=1e-6)
        for name, value in optimizer.state[on_gpu].items():
            assert value.device == on_gpu.device
            torch.testing.assert_close(value.cpu(), optimizer.state[on_cpu][name], rtol=1e-5, atol=1e-6)


def test_a_model_that_moved_is_refused_until_its_state_follows():
    stays = nn.Sequential(nn.Linear(20, 32), nn.Linear(32, 20))
    moves = copy.deepcopy(stays)
    mask = {"0.weight": RowMask([1, 30], (32, 20))}
    optimizers = [SparseMaskedAdamW(m.named_parameters(), masks=mask, **OPTIONS) for m in (stays, moves)]

    def train(*pairs, seed):
        for model, optimizer in pairs:
            optimizer.zero_grad()
            model(random(8, 20, seed=seed).to(model[0].weight.device)).square().mean().backward()
            optimizer.step()

    both = list(zip((stays, moves), optimizers, strict=True))
    train(*both, seed=0)
    moves.to(DEVICE)
    if ON_GPU:
        before = [p.detach().clone() for p in moves.parameters()]
        with pytest.raises(ValueError, match="'0.weight': its state is on cpu, expected cuda"):
            train(both[1], seed=1)
        assert all(torch.equal(a, b) for a, b in zip(before, moves.parameters(), strict=True))
    optimizers[1].load_state_dict(optimizers[1].state_dict())
    for seed in (1, 2):
        train(*both, seed=seed)
    for a, b in zip(stays.parameters(), moves.parameters(), strict=True):
        assert b.device == DEVICE
        torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-5)


@needs_two
def test_one_optimizer_over_two_gpus():
    """The second GPU's parameters are stepped, restored and clipped while the first is current."""
    devices = [torch.device("cuda", i) for i in (0, 1)]
    models = [Model(torch.bfloat16, device) for device in devices]
    named = [(f"{i}.{n}", p) for i, model in enumerate(models) for n, p in model.params.items()]
    chosen = {f"{i}.{n}": mask for i, model in enumerate(models) for n, mask in model.masks.items()}
    optimizer = SparseMaskedAdamW(named, masks=chosen, lr=torch.tensor(0.05, device=devices[0]))
    for step in range(4):
        for model in models:
            model.give(step)
        if step:
            with no_waiting():
                optimizer.step()
        else:
            optimizer.step()
    assert torch.cuda.current_device() == 0
    assert_same(*({n: bits(p.detach()).cpu() for n, p in model.params.items()} for model in models))
    optimizer.load_state_dict(carried_by_file(optimizer.state_dict(), "cpu"))
    for model in models:
        model.give(9)
    norm = optimizer.clip_grad_norm_(1e9)
    assert norm.device == devices[0] and bool(norm.isfinite())
    optimizer.step()
    assert_same(*({n: bits(p.detach()).cpu() for n, p in model.params.items()} for model in models))


@needs_two
def test_a_gpu_that_is_not_the_current_one():
    second = Model(torch.bfloat16, torch.device("cuda", 1))
    first = Model(torch.bfloat16, torch.device("cuda", 0))
    for step in range(3):
        for model in (first, second):
            model.step(step)
    assert torch.cuda.current_device() == 0
    assert_same(first.snapshot(), second.snapshot())
