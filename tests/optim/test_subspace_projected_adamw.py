"""What is projected is the update: it stays out of the subspace whatever AdamW, weight decay and masks make of it."""

import copy
import pickle
import warnings

import pytest
import torch
from cases.subspace import orthogonal
from torch import nn

from sparse_cl import (
    ColumnMask,
    ElementMask,
    RowMask,
    SparseMaskedAdamW,
    Subspace,
    SubspaceMemory,
    SubspaceProjectedAdamW,
    TwoFourMask,
)

SHAPE = (24, 32)


def uniform(shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


MASKS = {
    "dense": lambda: None,
    "rows": lambda: RowMask(range(1, 24, 3), SHAPE),
    "rows-gain": lambda: RowMask([2, 5, 7], SHAPE, gain=[0.5, 2.0, 1.0]),
    "columns": lambda: ColumnMask(range(0, 32, 2), SHAPE),
    "columns-gain": lambda: ColumnMask(range(20), SHAPE, gain=torch.linspace(0.5, 2, 20)),
    "elements": lambda: ElementMask(uniform(SHAPE) < 0.7),
    "2:4": lambda: TwoFourMask((uniform((24, 8, 4)).argsort(-1) < 2).view(SHAPE)),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
LR = 0.01


def parameter(dtype, seed=0):
    return nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).mul(0.2).to(dtype))


def gradient(step, basis):
    """Mostly inside the basis, as the gradient of a new domain is that shares directions with the old ones."""
    rng = torch.Generator().manual_seed(100 + step)
    inside = torch.randn(SHAPE[0], basis.shape[1], generator=rng) * 3
    return inside @ basis.mT.float() + torch.randn(SHAPE, generator=rng)


def used(rank):
    return orthogonal(SHAPE[1], seed=5)[:, :rank]


def stepped(param, rank, mask=None, steps=50, **options):
    basis = used(rank)
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    subspace = Subspace(basis.to(dtype))
    opt = SubspaceProjectedAdamW(
        [("w", param)],
        lr=LR,
        weight_decay=0.1,
        masks={} if mask is None else {"w": mask},
        memory={"w": subspace},
        **options,
    )
    for step in range(steps):
        param.grad = gradient(step, basis).to(param.dtype)
        opt.step()
    return opt


def weights(param, opt, mask):
    """The parameter with its masters in place, float64."""
    result = param.detach().double().clone()
    master = opt.state[param].get("master")
    if master is not None:
        positions = torch.arange(param.numel()) if mask is None else mask.positions()
        result.view(-1)[positions] = master.double().view(-1)
    return result


def leak(change, rank):
    return float((change @ used(rank)).square().sum() / change.square().sum())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("rank", [6, 13])
def test_leak_of_fifty_steps(name, dtype, rank, implementation):
    """Masks of single weights have no bound: there it is a fraction of what AdamW alone leaves, two thirds."""
    mask, param = MASKS[name](), parameter(dtype)
    start = param.detach().double().clone()
    opt = stepped(param, rank, mask)
    change = weights(param, opt, mask) - start
    assert change.norm() > 0.3
    assert leak(change, rank) <= (0.1 if name in ("elements", "2:4") else 1e-6)
    if mask is not None:
        frozen = ~mask.to_dense()
        assert torch.equal(param.detach()[frozen], start.to(dtype)[frozen])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projecting_the_gradient_instead_leaks(dtype):
    """What the bound is measured against: the same run with the gradient projected before AdamW."""
    param, rank = parameter(dtype), 6
    start = param.detach().double().clone()
    subspace = Subspace(used(rank).float())
    opt = torch.optim.AdamW([param], lr=LR, weight_decay=0.1)
    for step in range(50):
        param.grad = subspace.project_out_(gradient(step, used(rank)).to(dtype))
        opt.step()
    assert leak(param.detach().double() - start, rank) > 0.005


@pytest.mark.parametrize("name", ["dense", "rows", "rows-gain", "columns", "columns-gain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_update_is_the_projection_of_the_one_adamw_would_make(name, dtype, implementation):
    mask, rank = MASKS[name](), 6
    param, plain = parameter(dtype), parameter(dtype)
    basis = used(rank)
    if isinstance(mask, ColumnMask):
        kept = torch.zeros(SHAPE[1], rank, dtype=torch.float64)
        kept[mask.index.long()] = basis[mask.index.long()]
        basis = torch.linalg.qr(kept).Q
    masks = {} if mask is None else {"w": mask}
    ours = SubspaceProjectedAdamW([("w", param)], lr=LR, masks=masks, memory={"w": used(rank).to(dtype)})
    theirs = SparseMaskedAdamW([("w", plain)], lr=LR, masks=masks)
    for step in range(5):
        before = param.detach().double().clone()
        plain.data.copy_(param.data)
        param.grad = plain.grad = gradient(step, used(rank)).to(dtype)
        ours.step()
        theirs.step()
        update = plain.detach().double() - before
        expected = update - update @ basis @ basis.mT
        tolerance = 2e-7 if dtype == torch.float32 else 1e-14
        assert (param.detach().double() - before - expected).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dense", "rows", "columns", "elements"])
def test_parameters_are_their_rounded_masters(dtype, name, implementation):
    mask, param = MASKS[name](), parameter(dtype)
    start = param.detach().clone()
    opt = stepped(param, 6, mask, steps=10)
    assert torch.equal(param.detach(), weights(param, opt, mask).to(dtype))
    assert not torch.equal(param.detach(), start)


@pytest.mark.parametrize("name", ["dense", "rows", "elements"])
def test_without_masters_projected_updates_are_rounded_without_bias(name, implementation):
    """Each step adds far less than half a unit in the last place, so rounding to nearest would not move at all."""
    mask = MASKS[name]()
    torch.manual_seed(0)
    param = nn.Parameter(torch.ones(SHAPE, dtype=torch.bfloat16))
    memory = {"w": used(4).float()}
    opt = SubspaceProjectedAdamW(
        [("w", param)], lr=1e-4, weight_decay=0, masks=mask and {"w": mask}, memory=memory, master_weights=False
    )
    assert "master" not in opt.state[param]
    wide = nn.Parameter(torch.ones(SHAPE, dtype=torch.float64))
    exact = SubspaceProjectedAdamW(
        [("w", wide)], lr=1e-4, weight_decay=0, masks=mask and {"w": mask}, memory={"w": used(4)}
    )
    sign = torch.randn(SHAPE).sign()
    for _ in range(300):
        param.grad, wide.grad = sign.bfloat16(), sign.double()
        opt.step()
        exact.step()
    active = torch.ones(SHAPE, dtype=torch.bool) if mask is None else mask.to_dense()
    error = (param.detach().double() - wide.detach())[active]
    assert (wide.detach() - 1)[active].abs().mean() > 0.02
    assert error.mean().abs() < 6 * error.std() / error.numel() ** 0.5
    assert error.abs().mean() < 0.02
    assert torch.equal(param.detach()[~active], torch.ones_like(param)[~active])


@pytest.mark.parametrize("name", ["dense", "rows", "columns"])
def test_a_strided_parameter(name):
    mask = MASKS[name]()
    flat = parameter(torch.float32)
    turned = nn.Parameter(flat.detach().clone().t().contiguous().t())
    for param in (flat, turned):
        stepped(param, 6, mask, steps=5)
    assert not turned.is_contiguous()
    assert torch.allclose(flat, turned, atol=1e-7)


def test_a_parameter_without_a_basis_is_updated_as_without_memory(implementation):
    ours, theirs = parameter(torch.float32), parameter(torch.float32)
    other = parameter(torch.float32, seed=1)
    memory = {"other": used(4).float(), "w": torch.zeros(SHAPE[1], 0)}
    first = SubspaceProjectedAdamW([("w", ours), ("other", other)], lr=LR, memory=memory)
    second = SparseMaskedAdamW([("w", theirs)], lr=LR)
    for step in range(5):
        ours.grad = theirs.grad = other.grad = gradient(step, used(4))
        first.step()
        second.step()
    assert torch.equal(ours, theirs)
    assert torch.equal(SubspaceProjectedAdamW([ours]).param_groups[0]["params"][0], ours)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm, self.linear = nn.Embedding(10, 8), nn.LayerNorm(8), nn.Linear(8, 6)

    def train_once(self, opt, seed):
        tokens = torch.randint(10, (16,), generator=torch.Generator().manual_seed(seed))
        opt.zero_grad()
        self.linear(self.norm(self.embedding(tokens))).square().sum().backward()
        opt.step()

    def remember(self, energy=0.6):
        memory = SubspaceMemory(self, energy=energy)
        self.linear.weight.grad = torch.randn(6, 8)
        memory.observe()
        memory.consolidate()
        return memory


REST = ["embedding.weight", "norm.weight", "norm.bias", "linear.bias"]


def changed(model, before):
    return [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]


def state_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "loaded"])
@pytest.mark.parametrize("rest", ["freeze", "train"])
def test_what_no_basis_protects_is_frozen_after_the_first_domain(rest, bound, tmp_path):
    model = Model()
    memory = SubspaceMemory(model, energy=0.6)
    opt = SubspaceProjectedAdamW(model.named_parameters(), lr=LR, memory=memory, rest=rest)
    before = state_of(model)
    model.train_once(opt, 0)
    assert set(changed(model, before)) == {*REST, "linear.weight"}
    memory.observe()
    memory.consolidate()
    if not bound:
        memory.save(tmp_path / "memory.safetensors")
        memory = SubspaceMemory.load(tmp_path / "memory.safetensors")
        opt.set_memory(memory)
    before = state_of(model)
    for seed in range(3):
        model.train_once(opt, seed)
    expected = {"linear.weight"} | (set(REST) if rest == "train" else set())
    assert set(changed(model, before)) == expected
    assert memory.leak(before, state_of(model))["linear.weight"] <= 1e-6


def test_clipping_leaves_out_what_is_frozen():
    model = Model()
    opt = SubspaceProjectedAdamW(model.named_parameters(), memory=model.remember())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    norm = opt.clip_grad_norm_(1.0)
    assert norm == pytest.approx(48**0.5)
    assert torch.equal(model.norm.weight.grad, torch.ones(8))
    assert model.linear.weight.grad.norm() == pytest.approx(1.0, abs=1e-5)


def test_bases_are_followed_as_they_grow():
    model = nn.Linear(32, 24, bias=False)
    memory = SubspaceMemory(model, energy=0.5)
    opt = SubspaceProjectedAdamW(model.parameters(), lr=LR, memory=memory)
    opt.register_step_pre_hook(lambda *_: memory.observe())
    ranks = []
    for domain in range(3):
        before = model.weight.detach().clone()
        for step in range(5):
            model.weight.grad = gradient(10 * domain + step, used(4 + domain))
            opt.step()
        leaked = memory.leak({"weight": before}, model)["weight"]
        assert leaked <= 1e-6
        memory.consolidate()
        ranks.append(memory.rank("weight"))
    assert ranks == sorted(set(ranks))


def test_a_changed_mask_changes_the_projection():
    param = parameter(torch.float32)
    opt = stepped(param, 6, ColumnMask(range(20), SHAPE), steps=3)
    opt.set_masks({"w": ColumnMask(range(8, 32), SHAPE)})
    before = param.detach().double().clone()
    for step in range(50):
        param.grad = gradient(step, used(6))
        opt.step()
    change = param.detach().double() - before
    assert not change[:, :8].any()
    assert leak(change, 6) <= 1e-6


@pytest.mark.parametrize(
    ("mask", "rank", "message"),
    [
        (None, 32, r"parameter 'w': earlier domains use all directions \(32 of 32\), so it is not updated"),
        (ColumnMask(range(5), SHAPE), 7, r"parameter 'w': earlier domains use all directions of its mask \(7 of 32\)"),
    ],
)
def test_a_saturated_layer_warns_once_and_stays(mask, rank, message):
    param, other = parameter(torch.float32), parameter(torch.float32, seed=1)
    before = param.detach().clone()
    masks = {} if mask is None else {"w": mask}
    with pytest.warns(UserWarning, match=message):
        opt = SubspaceProjectedAdamW([("w", param), ("v", other)], masks=masks, memory={"w": used(rank).float()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            param.grad = other.grad = gradient(step, used(4))
            opt.step()
            opt.set_memory({"w": used(rank).float()})
    assert torch.equal(param, before)
    assert param not in opt.state
    assert opt.state[other]["step"] == 3


def test_a_skipped_step_changes_nothing():
    param = parameter(torch.float32)
    opt = stepped(param, 6, steps=3)
    before, state = param.detach().clone(), copy.deepcopy(dict(opt.state[param]))
    param.grad = torch.full(SHAPE, torch.inf)
    opt.found_inf, opt.grad_scale = torch.tensor([1.0]), torch.tensor([1024.0])
    opt.step()
    assert torch.equal(param, before)
    assert all(torch.equal(value, state[key]) for key, value in opt.state[param].items())
    opt.found_inf = torch.tensor([0.0])
    param.grad = gradient(3, used(6)) * 1024
    opt.step()
    assert leak(param.detach().double() - before.double(), 6) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_goes_on_with_the_same_bits(dtype):
    first = parameter(dtype)
    opt = stepped(first, 6, MASKS["rows"](), steps=3)
    second = nn.Parameter(first.detach().clone())
    masks, memory = {"w": MASKS["rows"]()}, {"w": used(6).float()}
    resumed = SubspaceProjectedAdamW([("w", second)], lr=LR, weight_decay=0.1, masks=masks, memory=memory)
    resumed.load_state_dict(opt.state_dict())
    for step in range(3, 6):
        first.grad = second.grad = gradient(step, used(6)).to(dtype)
        opt.step()
        resumed.step()
    assert torch.equal(first, second)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_protects_its_own_parameters(copied):
    model = Model()
    memory = model.remember()
    opt = copied(SubspaceProjectedAdamW(model.named_parameters(), lr=LR, memory=memory))
    params = dict(zip(opt.param_groups[0]["param_names"], opt.param_groups[0]["params"], strict=True))
    assert params["linear.weight"] is not model.linear.weight
    before = {name: p.detach().clone() for name, p in params.items()}
    for p in params.values():
        p.grad = torch.randn(p.shape)
    opt.step()
    assert memory.leak(before, params)["linear.weight"] <= 1e-6
    assert [name for name in params if not torch.equal(before[name], params[name])] == ["linear.weight"]
