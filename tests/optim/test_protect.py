"""The protection behind other optimizers: equal to the fused one, and refused where it would protect nothing."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from cases.rules import M, N, Oracle, basis, drift, gradient, parameter, random, rms, run, subspace

from sparse_cl import (
    ElasticAdamW,
    RowMask,
    SparseMaskedAdamW,
    Subspace,
    SubspaceMemory,
    SubspaceProjectedAdamW,
    protect,
)
from sparse_cl.nn import ActiveLinear
from sparse_cl.optim.protect import _rounded

GIVEN = {"hard": {"budget": 0.0}, "pull": {"strength": 5.0}, "budget": {"budget": 1e-3}}


@pytest.mark.parametrize("rule", GIVEN)
def test_behind_torch_s_adamw_it_is_elastic_adamw(rule):
    ours, theirs, s = parameter(), parameter(), subspace()
    fused = ElasticAdamW([ours], lr=1e-2, weight_decay=0.1, memory={ours: s}, **GIVEN[rule], second_moment="entry")
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    protection = protect(optimizer, {theirs: s}, **GIVEN[rule])
    run(fused, ours, 50)
    run(optimizer, theirs, 50)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    said, expected = (next(iter(x.old_output_drift().values())) for x in (protection, fused))
    assert said == pytest.approx(expected, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("rule", GIVEN)
def test_a_step_that_the_scaler_has_a_fused_optimizer_skip_is_not_corrected(rule, every):
    found, no_step = [], (4, 5)
    for skips in (True, False):
        weight, s = parameter(), subspace()
        optimizer = torch.optim.AdamW([weight], lr=1e-2, fused=True)
        protect(optimizer, {weight: s}, **GIVEN[rule], every=every)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(8):
            if step in no_step and not skips:
                continue
            scale = scaler.scale(torch.ones(())).item()
            weight.grad = torch.full((M, N), torch.inf) if step in no_step else gradient(step).float() * scale
            before = weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert every > 1 or torch.equal(weight, before) == (step in no_step)
        found.append(weight.detach())
    torch.testing.assert_close(*found, rtol=0, atol=0 if every == 1 else 1e-6)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "muon": lambda p: torch.optim.Muon(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bounds_hold_behind_any_optimizer(name, dtype):
    s = subspace()
    for given in (GIVEN["hard"], GIVEN["budget"]):
        weight = parameter(dtype)
        start, optimizer, seen = weight.detach().double().clone(), OPTIMIZERS[name]([weight]), []
        protection = protect(optimizer, {weight: s}, **given)
        run(optimizer, weight, 50, each=lambda _, w=weight, b=start, x=seen: x.append(drift(w.detach(), b, s)))
        change = weight.detach().double() - start
        leak = float((change @ basis()).square().sum() / change.square().sum())
        free = parameter(dtype)
        run(OPTIMIZERS[name]([free]), free, 50)
        outside = [x - x @ basis() @ basis().mT for x in (change, free.detach().double() - start)]
        assert outside[0].norm() >= 0.5 * outside[1].norm()
        if dtype == torch.bfloat16:
            # One rounding to bfloat16 of each weight, which no correction undoes.
            assert (change @ basis()).abs().max() <= 5 * 2**-8 * float(weight.detach().abs().max()) or given is not (
                GIVEN["hard"]
            )
        elif given is GIVEN["hard"]:
            assert leak <= 1e-6
        else:
            assert max(seen) <= 1e-3 * (1 + 1e-4)
        assert next(iter(protection.old_output_drift().values())) == pytest.approx(seen[-1], rel=1e-3, abs=1e-9)


def test_every_third_step():
    weight, s = parameter(), subspace()
    start, seen = weight.detach().double().clone(), []
    optimizer = torch.optim.AdamW([weight], lr=1e-2)
    protect(optimizer, {weight: s}, budget=1e-4, every=3)
    run(optimizer, weight, 30, each=lambda _: seen.append(drift(weight.detach(), start, s)))
    assert max(seen[2::3]) <= 1e-4 * (1 + 1e-4)
    assert max(seen) > 1e-4


def test_a_pull_every_third_step_takes_three_rates():
    weight, s = parameter(), subspace()
    oracle = Oracle("pull", weight, Subspace(s.basis, s.usage * 5), decay=0.01)
    optimizer = torch.optim.AdamW([weight], lr=1e-2)
    protect(optimizer, {weight: s}, strength=5 * rms(weight), every=3)
    weight.grad = gradient(0).float()
    start = weight.detach().double().clone()
    plain = torch.nn.Parameter(start.clone())
    adam = torch.optim.AdamW([plain], lr=1e-2)
    plain.grad = weight.grad.double()
    for _ in range(3):
        optimizer.step()
        adam.step()
    expected = start + oracle.pull(plain.detach() - start, 3e-2)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=2e-6)


def test_a_checkpoint_goes_on_with_the_same_bits_and_an_end_ends():
    first, s = parameter(), subspace()
    optimizer = torch.optim.AdamW([first], lr=1e-2)
    protection = protect(optimizer, {first: s}, budget=1e-3)
    run(optimizer, first, 5)
    second = torch.nn.Parameter(first.detach().clone())
    resumed = torch.optim.AdamW([second], lr=1e-2)
    again = protect(resumed, {second: s}, budget=1e-3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.load_state_dict(copy.deepcopy(protection.state_dict()))
    for each, weight in ((optimizer, first), (resumed, second)):
        run(each, weight, 5, first=5)
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match=r"expected origin of shape \(24, 4\), got \(24, 5\)"):
        protect(torch.optim.SGD([second]), {second: subspace(r=4)}, budget=1.0).load_state_dict(protection.state_dict())
    protection.remove()
    plain = torch.nn.Parameter(first.detach().clone())
    other = torch.optim.AdamW([plain], lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, first, 2, first=10)
    run(other, plain, 2, first=10)
    assert torch.equal(first, plain)


def test_a_memory_of_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))
    memory = SubspaceMemory(model, source="inputs", energy=0.99, max_rank=3)
    old = random(64, 8, seed=5, dtype=torch.float32) * torch.tensor([3.0, 2, 1, 0, 0, 0, 0, 0])
    with memory.watch():
        before = model(old).detach()
    memory.observe()
    memory.consolidate()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    protect(optimizer, memory, budget=0.0)
    for bias in (model[0].bias, model[2].bias):
        bias.requires_grad_(False)
    for step in range(20):
        optimizer.zero_grad()
        model(random(32, 8, seed=step, dtype=torch.float32)).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(model[0](old), torch.nn.functional.linear(old, model[0].weight, model[0].bias))
    assert (model(old) - before).norm() <= 0.2 * before.norm()


def test_what_it_refuses():
    weight, s = parameter(), subspace()
    optimizer = torch.optim.AdamW([weight], lr=1e-2)
    with pytest.raises(TypeError, match="optimizer: expected a torch.optim.Optimizer, got list"):
        protect([weight], {weight: s}, budget=1.0)
    with pytest.raises(ValueError, match="every: expected at least 1, got 0"):
        protect(optimizer, {weight: s}, budget=1.0, every=0)
    with pytest.raises(ValueError, match="memory: a key is not a parameter of this optimizer"):
        protect(optimizer, {parameter(): s}, budget=1.0)
    with pytest.raises(ValueError, match=r"has shape \(24, 32\), but its basis has width 16"):
        protect(optimizer, {weight: subspace(n=16)}, budget=1.0)
    layer = ActiveLinear(N, M, mask=RowMask([0, 3], (M, N)))
    with pytest.raises(
        ValueError, match="is the leaf of an ActiveLinear, which is written into the weight after the step"
    ):
        protect(torch.optim.AdamW([layer.active]), {layer.active: s}, budget=1.0)
    protection = protect(optimizer, {weight: s}, budget=1.0)
    with pytest.raises(ValueError, match="it is protected already; call .remove"):
        protect(optimizer, {weight: s}, budget=1.0)
    protection.remove()
    protect(optimizer, {weight: s}, budget=1.0)
    masked = SparseMaskedAdamW([weight], masks={weight: RowMask([0], (M, N))})
    with pytest.raises(ValueError, match="it has masks, .* give ElasticAdamW the masks and the memory"):
        protect(masked, {weight: s}, budget=1.0)
    later = SparseMaskedAdamW([weight])
    protect(later, {weight: s}, budget=1.0)
    later.set_masks({weight: RowMask([0], (M, N))})
    before = weight.detach().clone()
    with pytest.raises(ValueError, match="it has masks"):
        run(later, weight, 1)
    assert torch.equal(weight, before)


def test_a_wrapper_that_steps_other_tensors_is_refused_at_the_first_step():
    weight, s = parameter(), subspace()
    optimizer = torch.optim.AdamW([weight], lr=1e-2)
    protect(optimizer, {weight: s}, budget=1.0)
    before = weight.detach().clone()
    flat = torch.nn.Parameter(weight.detach().flatten().clone())
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match="steps other tensors than the model's"):
        optimizer.step()
    assert torch.equal(weight, before)
    assert torch.equal(flat, before.flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_right_on_average(dtype):
    values = torch.linspace(-1.3, 1.7, 200).repeat(2000, 1)
    rounded = _rounded(values, dtype, torch.Generator().manual_seed(0))
    assert torch.equal(rounded, rounded.to(dtype))
    step = values[0].abs().clamp(min=2**-10) * torch.finfo(dtype).eps
    assert ((rounded.double() - values).abs() <= step).all()
    assert ((rounded.double().mean(0) - values[0]).abs() <= 5 * step / 2000**0.5).all()
    exact = torch.tensor([0.0, 1.0, -2.5])
    assert torch.equal(_rounded(exact, dtype, torch.Generator()), exact.to(dtype))


def known():
    """A model of two layers, and a memory of what one domain puts into them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(N, N), torch.nn.Tanh(), torch.nn.Linear(N, N))
    memory = SubspaceMemory(model, source="inputs", max_rank=4)
    look(memory, model)
    return model, memory


def look(memory, model):
    with torch.no_grad(), memory.watch():
        model(torch.randn(40, 3) @ torch.randn(3, N))
    memory.observe()
    memory.consolidate()


def step(model, optimizer, **arguments):
    optimizer.zero_grad()
    model(torch.randn(16, N)).square().mean().backward()
    optimizer.step(**arguments)


@pytest.mark.parametrize("empty", [False, True])
def test_a_memory_that_has_learned_since_is_not_followed_silently(empty):
    model, memory = known()
    memory = SubspaceMemory(model, source="inputs", max_rank=4) if empty else memory
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.warns(UserWarning, match="it has learned no domain, so nothing") if empty else nullcontext():
        protection = protect(optimizer, memory, budget=1e-4)
    look(memory, model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"the memory has learned a domain since, .* call .remove\(\) of it"):
        step(model, optimizer)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    protection.remove()
    protection = protect(optimizer, memory, budget=1e-4)
    step(model, optimizer)
    assert 0 < max(protection.old_output_drift().values()) <= 1.01e-4


def test_a_model_that_was_moved_since_is_refused_before_it_is_stepped():
    model, memory = known()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    protect(optimizer, memory, budget=1e-4)
    step(model, optimizer)
    model.bfloat16().float()
    step(model, optimizer)
    model.double()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"was moved to another device or dtype since; call .remove\(\)"):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_what_is_added_to_the_optimizer_is_refused_or_named():
    model, memory = known()
    optimizer = torch.optim.AdamW(model[2].parameters(), lr=1e-2)
    protect(optimizer, memory, budget=1e-4)
    extra = torch.nn.Parameter(torch.zeros(N, N))
    step(model, optimizer)
    optimizer.add_param_group({"params": [extra]})
    extra.grad = torch.ones(N, N)
    with pytest.warns(UserWarning, match="1 parameters of two or more dimensions are trained unprotected"):
        optimizer.step()
    optimizer.add_param_group({"params": list(model[0].parameters())})
    with pytest.raises(RuntimeError, match="parameter number 0 of group 2 was added to the optimizer since"):
        step(model, optimizer)


@pytest.mark.parametrize("ours", [False, True])
def test_an_embedding_whose_lookups_nobody_counted_is_named(ours):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(30, N), torch.nn.Linear(N, N))
    memory = SubspaceMemory(model)  # of gradients
    model(torch.arange(8)).square().mean().backward()
    memory.observe()
    memory.consolidate()
    if ours:
        optimizer = ElasticAdamW(model.named_parameters(), lr=1e-2, memory=memory)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        protect(optimizer, memory)
    with pytest.warns(UserWarning, match="1 parameters of two or more dimensions are trained unprotected"):
        optimizer.step()
    frozen = SubspaceProjectedAdamW(model.named_parameters(), lr=1e-2, memory=memory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen.step()


def test_a_closure_has_the_rest_named_too():
    model, memory = known()
    extra = torch.nn.Parameter(torch.eye(N))
    optimizer = torch.optim.AdamW([*model.parameters(), extra], lr=1e-2)
    protect(optimizer, memory, budget=1e-4)

    def closure():
        optimizer.zero_grad()
        loss = (model(torch.randn(16, N)) @ extra).square().mean()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="trained unprotected, as it never saw what goes into them: number 4 of"):
        optimizer.step(closure)


class Averages(torch.optim.AdamW):
    """As the schedule-free optimizers."""

    def train(self): ...
    def eval(self): ...


def test_optimizers_that_keep_another_copy_of_the_weights_are_refused():
    weight, s = parameter(torch.bfloat16), subspace()
    with pytest.raises(ValueError, match="writes 16-bit weights from its float32 masters, .* master_weights=False"):
        protect(SparseMaskedAdamW([weight]), {weight: s}, budget=1.0)
    protect(SparseMaskedAdamW([weight], master_weights=False), {weight: s}, budget=1.0)
    with pytest.raises(ValueError, match="Averages keeps an average of the weights"):
        protect(Averages([weight]), {weight: s}, budget=1.0)
    own = torch.optim.AdamW([weight])
    own.param_groups[0]["lr"] = None  # as Adafactor of transformers has it
    with pytest.raises(ValueError, match="AdamW chooses its own learning rate"):
        protect(own, {weight: s}, budget=1.0)


class Wrapper(torch.optim.Optimizer):
    """As accelerate's, which has all these methods and no hooks of its own."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def train(self): ...
    def eval(self): ...


class Steps(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("rule", GIVEN)
@pytest.mark.parametrize("every", [1, 2])
def test_a_step_within_a_step_is_one(rule, every):
    ends = []
    for kind in (torch.optim.AdamW, Steps):
        weight, s = parameter(), subspace()
        optimizer = kind([weight], lr=1e-2)
        protection = protect(Wrapper(optimizer), {weight: s}, **GIVEN[rule], every=every)
        run(optimizer, weight, 9)
        assert protection.steps == 9
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


def test_what_is_frozen_in_mid_domain_stays_as_it_is():
    model, memory = known()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    protection = protect(optimizer, memory, strength=5.0)
    step(model, optimizer)
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    for _ in range(3):
        step(model, optimizer)
    assert torch.equal(model[0].weight, before) and protection.steps == 4
