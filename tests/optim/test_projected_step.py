"""How a projected step is made: in few calls, beside the live weights, and in the precision that the bound allows."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from cases.products import Products, random
from cases.subspace import orthogonal
from torch import nn

from sparse_cl import (
    ColumnMask,
    DriftBudget,
    LowRankPull,
    ProjectedAdamW,
    RowMask,
    SparseMaskedAdamW,
    Subspace,
    SubspaceProjectedAdamW,
    SubspaceProjection,
    linalg,
    ops,
)
from sparse_cl.optim import projected_adamw, projected_step, state

SHAPE, RANK = (96, 256), 64


def layers(shapes, rank=2, seed=0):
    params = [(f"p{i}", nn.Parameter(random(*shape, seed=seed + i))) for i, shape in enumerate(shapes)]
    memory = {name: orthogonal(p.shape[1], seed=i)[:, :rank].float() for i, (name, p) in enumerate(params)}
    return params, memory


def set_gradients(params, step=0):
    for i, (_, p) in enumerate(params):
        p.grad = random(*p.shape, seed=1000 * step + i).to(p.dtype)


@pytest.fixture
def calls(monkeypatch):
    """How many parameters each call of an op gets."""
    seen = []
    for name in ("masked_adamw_", "apply_updates_"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, op=op: (seen.append(len(args[0])), op(*args))[1])
    return seen


MIXED = [(12, 16), (7, 9), (12, 16), (12, 8), (7, 9), (12, 16)]


def test_layers_share_calls_and_make_two_products_each(calls):
    params, memory = layers(MIXED)
    optimizer = SubspaceProjectedAdamW(params, memory=memory)
    for step in range(3):
        set_gradients(params, step)
        calls.clear()
        with Products() as made:
            optimizer.step()
        assert calls == [6, 6]
        assert made.count == 2 * 6


@pytest.mark.parametrize("together", [1, 200, 400, 10**6])
@pytest.mark.parametrize("rows", [False, True])
def test_what_shares_a_call_is_stepped_as_if_alone(monkeypatch, together, rows):
    monkeypatch.setattr(projected_step, "TOGETHER", together)
    params, memory = layers(MIXED)
    masks = {"p0": RowMask([1, 3, 4], (12, 16)), "p2": RowMask([0, 9, 11], (12, 16))} if rows else {}
    alone = [[(name, nn.Parameter(p.detach().clone()))] for name, p in params]
    ours = SubspaceProjectedAdamW(params, lr=1e-2, memory=memory, masks=masks)
    theirs = [
        SubspaceProjectedAdamW(
            own,
            lr=1e-2,
            memory={own[0][0]: memory[own[0][0]]},
            masks={k: m for k, m in masks.items() if k == own[0][0]},
        )
        for own in alone
    ]
    for step in range(3):
        set_gradients(params, step)
        for (_, p), ((_, own),) in zip(params, alone, strict=True):
            own.grad = p.grad
        ours.step()
        for optimizer in theirs:
            optimizer.step()
    for (name, p), ((_, own),) in zip(params, alone, strict=True):
        torch.testing.assert_close(p, own, rtol=0, atol=1e-6, msg=name)


def test_the_scratch_holds_the_largest_layer_and_no_more(monkeypatch, calls):
    monkeypatch.setattr(projected_step, "TOGETHER", 256)
    params, memory = layers([(8, 16), (20, 16), (8, 16), (8, 16)])
    optimizer = SubspaceProjectedAdamW(params, memory=memory)
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
    (buffer,) = optimizer._scratch._buffers.values()
    assert buffer.numel() == 320
    assert sum(calls) == 2 * 2 * 4


def test_mixed_dtypes_and_kinds_of_projection():
    """Each parameter in a call of its kind, all of them as if alone."""
    shape, n = (10, 12), 12
    make = {
        "subspace": lambda w: SubspaceProjection(orthogonal(n)[:, :4].to(pick(w))),
        "budget": lambda w: DriftBudget(Subspace(orthogonal(n)[:, :2].to(pick(w))), 1e-3),
        "low rank": lambda w: LowRankPull(orthogonal(n)[:, :4].to(pick(w)), torch.linspace(0, 50, 4)),
        "low rank too": lambda w: LowRankPull(orthogonal(n, seed=1)[:, :3].to(pick(w)), torch.linspace(9, 50, 3)),
    }

    def pick(w):
        return torch.float64 if w.dtype == torch.float64 else torch.float32

    params = [
        (f"{name} {dtype}", nn.Parameter(random(*shape, seed=i).to(dtype)))
        for i, name in enumerate(make)
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    ]
    params.append(("plain", nn.Parameter(random(*shape))))
    alone = [(name, nn.Parameter(p.detach().clone())) for name, p in params]
    pulls = [
        {name: make[name.rsplit(" ", 1)[0]](p) for name, p in named if name != "plain"} for named in (params, alone)
    ]
    ours = ProjectedAdamW(params, lr=1e-2, projections=pulls[0], rest="train")
    theirs = [
        ProjectedAdamW([own], lr=1e-2, projections={k: v for k, v in pulls[1].items() if k == own[0]}) for own in alone
    ]
    for step in range(4):
        set_gradients(params, step)
        for (_, p), (_, own) in zip(params, alone, strict=True):
            own.grad = p.grad
        ours.step()
        for optimizer in theirs:
            optimizer.step()
    for (name, p), (_, own) in zip(params, alone, strict=True):
        assert torch.equal(p, own), name


def test_a_memory_is_projections_and_they_take_masks():
    """And a pull of another parameter does not care about them."""
    shape, used = (12, 16), orthogonal(16)[:, :3].float()
    masks = {"rows": RowMask([1, 5, 7], shape), "columns": ColumnMask(range(4, 16), shape)}
    ours, theirs = ({name: nn.Parameter(random(*shape)) for name in ("rows", "columns", "all")} for _ in range(2))
    pulled = nn.Parameter(random(*shape))
    projections = {name: SubspaceProjection(used) for name in ours} | {"pulled": LowRankPull(used, torch.ones(3))}
    first = ProjectedAdamW([*ours.items(), ("pulled", pulled)], lr=1e-2, projections=projections, masks=masks)
    second = SubspaceProjectedAdamW(theirs.items(), lr=1e-2, memory=dict.fromkeys(theirs, used), masks=masks)
    assert first.projections == projections
    for step in range(3):
        for i, (p, q) in enumerate(zip(ours.values(), theirs.values(), strict=True)):
            p.grad = q.grad = pulled.grad = random(*shape, seed=10 * step + i)
        first.step()
        second.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
    assert "projection.moved" in first.state[pulled]


@pytest.mark.parametrize("optimizer", [SparseMaskedAdamW, ProjectedAdamW, SubspaceProjectedAdamW])
def test_a_hook_runs_once_per_step(optimizer):
    """Also where an optimizer of each base class has been made, whose own step then has hooks."""
    weight, calls = nn.Parameter(random(6, 8)), []
    for each in (SubspaceProjectedAdamW, ProjectedAdamW, SparseMaskedAdamW):
        each([weight])
    made = optimizer([weight])
    made.register_step_pre_hook(lambda *_: calls.append("before"))
    made.register_step_post_hook(lambda *_: calls.append("after"))
    weight.grad = random(6, 8)
    made.step()
    assert calls == ["before", "after"]


# The live weight.


@pytest.mark.parametrize("kind", ["projected", "budget", "low rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_thread_sees_weights_of_before_or_after_a_step(kind, dtype):
    n, steps = 16, 30
    weight = nn.Parameter(random(16, n).to(dtype))
    if kind == "projected":
        optimizer = SubspaceProjectedAdamW([weight], lr=1e-2, memory={weight: orthogonal(n)[:, :5].float()})
    else:
        used = Subspace(orthogonal(n)[:, :5].float())
        given = DriftBudget(used, 1e-4) if kind == "budget" else LowRankPull(used, torch.linspace(0, 50, 5))
        optimizer = ProjectedAdamW([weight], lr=1e-2, projections={weight: given})
    seen, legal, done = [], [weight.detach().clone()], threading.Event()

    def watch():
        while not done.is_set():
            seen.append(weight.detach().clone())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for step in range(steps):
            weight.grad = random(16, n, seed=step).to(dtype)
            optimizer.step()
            legal.append(weight.detach().clone())
    finally:
        done.set()
        watcher.join()
    # A read may fall into a write, or be slower than a step: then it has entries of several, but of nothing else.
    legal = torch.stack(legal)
    assert all(bool((value == legal).any(0).all()) for value in seen)


# What each device and capture asks.


def test_state_is_not_made_under_capture(monkeypatch):
    monkeypatch.setattr(state, "is_capturing", lambda param: True)
    weight = nn.Parameter(random(6, 8))
    weight.grad = random(6, 8)
    before = weight.detach().clone()
    message = (
        "parameter 'w': its state would be made inside the CUDA graph .*; take at least one step before the capture"
    )
    pull = LowRankPull(orthogonal(8)[:, :3].float(), torch.ones(3))
    for optimizer in (
        SparseMaskedAdamW([("w", weight)]),
        SubspaceProjectedAdamW([("w", weight)], memory={"w": orthogonal(8)[:, :3].float()}),
        ProjectedAdamW([("w", weight)], projections={"w": pull}),
    ):
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert torch.equal(weight.detach(), before)
        assert not optimizer.state.get(weight)
        with monkeypatch.context() as patch:
            patch.setattr(state, "is_capturing", lambda param: False)
            optimizer.step()
        optimizer.step()
        before = weight.detach().clone()


@pytest.mark.parametrize("how", ["copied", "replaced", "amsgrad"])
def test_state_is_not_packed_anew_under_capture(monkeypatch, how):
    """Each replay would begin from the state at the capture."""
    weight = nn.Parameter(random(6, 8))
    weight.grad = random(6, 8)
    optimizer = SparseMaskedAdamW([("w", weight)])
    optimizer.step()
    if how == "copied":
        weight, optimizer = copy.deepcopy((weight, optimizer))
        weight.grad = random(6, 8)
    elif how == "replaced":
        optimizer.state[weight]["exp_avg"] = torch.zeros(6, 8)
    else:
        optimizer.param_groups[0]["amsgrad"] = True
    before = weight.detach().clone(), optimizer.state[weight]["step"].clone()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="take at least one step before the capture"):
        patch.setattr(state, "is_capturing", lambda param: True)
        optimizer.step()
    assert torch.equal(weight, before[0]) and torch.equal(optimizer.state[weight]["step"], before[1])
    optimizer.step()
    monkeypatch.setattr(state, "is_capturing", lambda param: True)
    optimizer.step()


def test_what_a_projection_keeps_is_not_made_under_capture(monkeypatch):
    weight = nn.Parameter(random(6, 8))
    weight.grad = random(6, 8)
    optimizer = ProjectedAdamW([("w", weight)], projections={})
    optimizer.step()
    optimizer.set_projections({"w": LowRankPull(orthogonal(8)[:, :3].float(), torch.ones(3))})
    monkeypatch.setattr(state, "is_capturing", lambda param: True)
    with pytest.raises(RuntimeError, match="take at least one step before the capture"):
        optimizer.step()


def test_a_matrix_of_llama_is_one_slice_on_a_device(monkeypatch):
    """Sixteen on the CPU, where a slice should stay in the cache."""
    x, basis = torch.empty(14336, 4096, device="meta", dtype=torch.bfloat16), torch.empty(4096, 64, device="meta")
    slices = []
    monkeypatch.setattr(linalg, "_subtract", lambda part, *_: slices.append(part.shape))
    linalg._project_out(x, basis)
    assert slices == [x.shape]


def test_what_a_captured_step_reads_outlives_what_takes_its_place(monkeypatch):
    weight = nn.Parameter(random(*SHAPE))
    opt = SubspaceProjectedAdamW([("w", weight)], memory={"w": Subspace(orthogonal(SHAPE[1])[:, :RANK].float())})
    weight.grad = random(*SHAPE, seed=1)
    opt.step()
    with monkeypatch.context() as patch:
        patch.setattr(projected_adamw, "is_capturing", lambda param: True)
        opt.step()
    (plan,) = [plan for group in opt._group_plans.values() for plan in group.plans]
    held = [weakref.ref(plan.projected), weakref.ref(plan.projected.buffer)]
    del plan
    opt._scratch = projected_step.Scratch()
    opt.set_memory({"w": Subspace(orthogonal(SHAPE[1])[:, :2].float())})
    opt.step()
    gc.collect()
    assert all(ref() is not None for ref in held)
