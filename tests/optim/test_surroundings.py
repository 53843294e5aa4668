"""What a caller has set around a step: a compiler, a default device, autocast."""

import pytest
import torch
from torch import nn

from sparse_cl import ElasticAdamW, SparseMaskedAdamW, SubspaceMemory, SubspaceProjectedAdamW, protect

BUDGET = 1e-4
MAKE = {
    "budget": lambda params, memory: ElasticAdamW(params, lr=1e-2, memory=memory, budget=BUDGET),
    "budget, every=2": lambda params, memory: ElasticAdamW(params, lr=1e-2, memory=memory, budget=BUDGET, every=2),
    "pull": lambda params, memory: ElasticAdamW(params, lr=1e-2, memory=memory),
    "hard": lambda params, memory: SubspaceProjectedAdamW(params, lr=1e-2, memory=memory),
    "protect": lambda params, memory: torch.optim.AdamW(params, lr=1e-2),
}


def remembered(widths=(8, 8, 7)):
    torch.manual_seed(0)
    first, second, third = widths
    model = nn.Sequential(nn.Linear(first, second, bias=False), nn.Tanh(), nn.Linear(second, third, bias=False))
    memory = SubspaceMemory(model, source="inputs", max_rank=3)
    with torch.no_grad(), memory.watch():
        model(torch.randn(200, 3) @ torch.randn(3, first))
    memory.observe()
    memory.consolidate()
    return model, memory


def drifts(model, memory, before):
    """By layer Σ λ_j ‖(W - W₀) u_j‖² as a share of Σ λ_j ‖W₀ u_j‖², in float64."""
    found = {}
    for name, param in model.named_parameters():
        subspace = memory.subspace(name)
        basis, values = subspace.basis.double(), subspace.values.double()
        moved, held = (
            (values * (w @ basis).square().sum(0)).sum() for w in (param.detach().double() - before[name], before[name])
        )
        found[name] = float(moved / held)
    return found


@pytest.mark.parametrize("rule", MAKE)
def test_a_compiled_step_is_the_step(rule):
    ways, said = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, memory = remembered()
        before = {name: param.detach().double().clone() for name, param in model.named_parameters()}
        optimizer = MAKE[rule](model.named_parameters(), memory)
        protection = protect(optimizer, memory, budget=BUDGET) if rule == "protect" else optimizer
        step = torch.compile(lambda own=optimizer: own.step(), backend="eager") if compiled else optimizer.step
        for seed in range(10):
            optimizer.zero_grad()
            (model(torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))) - 1).square().mean().backward()
            step()
        ways.append([param.detach() for param in model.parameters()])
        if rule != "hard":
            said.append(protection.old_output_drift())
            assert said[-1] == pytest.approx(drifts(model, memory, before), rel=1e-3)
    for eager, compiled in zip(*ways, strict=True):
        # A compiler divides torch's own AdamW otherwise.
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-6 if rule == "protect" else 0)
    if rule.startswith(("budget", "protect")):
        assert max(said[1].values()) <= BUDGET * (1 + 1e-4)


def test_a_default_device_is_for_the_caller_s_tensors():
    """ "meta" stands for a GPU: what lies on it by mistake holds nothing."""
    param, expected = (nn.Parameter(torch.zeros(6, 4)) for _ in range(2))
    wide = nn.Linear(1100, 4)
    torch.set_default_device("meta")
    try:
        for own, kind in ((param, SparseMaskedAdamW), (expected, torch.optim.AdamW)):
            own.grad = torch.ones(6, 4, device="cpu")
            kind([own], lr=0.1).step()
        assert SparseMaskedAdamW([nn.Parameter(torch.zeros(2, device="cpu"))]).clip_grad_norm_(1.0).device.type == "cpu"
        memory = SubspaceMemory(wide, source="inputs", max_rank=4)
        with torch.no_grad(), memory.watch():
            wide(torch.ones(10, 1100, device="cpu"))
        memory.observe()
        memory.consolidate()
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(param, expected)
    assert memory.rank("weight") == 1


def test_a_budget_is_measured_in_float32_under_autocast():
    model, memory = remembered((64, 32, 16))
    before = {name: param.detach().double().clone() for name, param in model.named_parameters()}
    with torch.autocast("cpu"):
        optimizer = ElasticAdamW(model.named_parameters(), lr=0.1, memory=memory, budget=1e-3)
        for seed in range(20):
            optimizer.zero_grad()
            model(torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            optimizer.step()
    assert max(drifts(model, memory, before).values()) <= 1e-3 * (1 + 1e-4)
