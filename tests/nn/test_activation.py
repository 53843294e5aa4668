"""activate, train, restore: what it makes of a model, what it leaves alone, and what it refuses."""

import copy

import pytest
import torch
from cases.active_mlp import COLUMNS, MASKS, ROWS, active_mlp, batches, losses, mlp
from torch import nn

from sparse_cl import ColumnMask, ElementMask, RowMask, SparseMaskedAdamW, SubspaceProjectedAdamW, TwoFourMask
from sparse_cl.nn import ActiveLinear, activate, restore, write_back
from sparse_cl.subspace import SubspaceMemory

GAINS = {
    "0.weight": RowMask([2, 29, 11, 3], (32, 20), gain=[1.0, 0.1, 0.5, 2.0]),
    "2.weight": ColumnMask([0, 31, 5], (20, 32), gain=[0.5, 1.5, 1.0]),
}


def train(model, optimizer, steps=6, clip=None, **options):
    for x in batches(next(model.parameters()).dtype, steps):
        optimizer.zero_grad()
        losses(model, [x], **options)
        if clip:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()


def dense_twin(dtype, masks, kind=SparseMaskedAdamW, **options):
    """The same model with masks on whole gradients."""
    model = mlp(dtype)
    for name, param in model.named_parameters():
        param.requires_grad_(name in masks)
    return model, kind(model.named_parameters(), lr=0.02, masks=masks, **options)


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.3}], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("masks", [MASKS, GAINS], ids=["masks", "gains"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_training_is_that_of_the_masked_dense_model(implementation, dtype, masks, options, clip):
    mine, (dense, its_optimizer) = active_mlp(dtype, masks), dense_twin(dtype, masks, **options)
    before = copy.deepcopy(dense.state_dict())
    optimizer = SparseMaskedAdamW(mine.named_parameters(), lr=0.02, **options)
    train(mine, optimizer, clip=clip)
    train(dense, its_optimizer, clip=clip)
    for layer in (mine[0], mine[2]):
        # No second master: the leaf is the optimizer's.
        assert layer.active.data_ptr() == optimizer.state[layer.active]["master"].data_ptr()
        assert layer.weight.grad is None
    restore(mine)
    # Leaf gradients of bfloat16 weights are rounded as the dense ones are, so the states follow one path.
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 4e-2}[dtype]
    for name, value in mine.state_dict().items():
        assert torch.allclose(value, dense.state_dict()[name], rtol=tolerance, atol=tolerance), name
        frozen = ~masks[name].to_dense() if name in masks else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value[frozen], before[name][frozen]), name
        assert frozen.all() or not torch.equal(value, before[name]), name


def test_under_autocast_too():
    mine, (dense, its_optimizer) = active_mlp(), dense_twin(torch.float32, MASKS)
    train(mine, SparseMaskedAdamW(mine.named_parameters(), lr=0.02), autocast=torch.bfloat16)
    train(dense, its_optimizer, autocast=torch.bfloat16)
    for name, value in mine.state_dict().items():
        assert torch.allclose(value, dense.state_dict()[name], rtol=1e-3, atol=1e-3), name


@pytest.mark.parametrize("master_weights", [True, False])
def test_a_narrow_leaf_follows_the_weight(implementation, master_weights):
    model = active_mlp(torch.bfloat16, leaf_dtype=torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    optimizer = SparseMaskedAdamW(model.named_parameters(), lr=0.02, master_weights=master_weights)
    train(model, optimizer)
    for i, mask in ((0, ROWS), (2, COLUMNS)):
        weight, active = model[i].weight, mask.to_dense()
        assert torch.equal(weight[active].view_as(model[i].active), model[i].active)
        assert torch.equal(weight[~active], before[f"{i}.weight"][~active])
        assert not torch.equal(weight, before[f"{i}.weight"])
        assert ("master" in optimizer.state[model[i].active]) == master_weights


def memory_of(model):
    """Eight of the directions of each layer's inputs."""
    memory = SubspaceMemory(model, max_rank=8, energy=0.9, source="inputs")
    with torch.no_grad(), memory.watch():
        model(batches(next(model.parameters()).dtype, 1)[0])
    memory.observe()
    memory.consolidate()
    return memory


@pytest.mark.parametrize("way", ["bound", "by name", "by weight", "unbound"])
def test_projected_updates_of_leaves_do_not_leak(way, tmp_path):
    plain = mlp()
    masks = {"0.weight": ROWS, "2.weight": ColumnMask(range(3, 29), (20, 32))}
    memory = memory_of(plain)
    bases = {name: memory.basis(name) for name in memory.names}
    mine = copy.deepcopy(plain)
    activate(mine, masks)
    given = memory
    if way == "bound":
        memory.bind(mine)
    elif way == "by name":
        given = bases
    elif way == "by weight":
        given = {mine[0].weight: bases["0.weight"], mine[2].weight: bases["2.weight"]}
    elif way == "unbound":
        memory.save(tmp_path / "memory")
        given = SubspaceMemory.load(tmp_path / "memory")
    before = copy.deepcopy(mine.state_dict())
    train(mine, SubspaceProjectedAdamW(mine.named_parameters(), lr=0.02, memory=given))

    dense, optimizer = dense_twin(torch.float32, masks, SubspaceProjectedAdamW, memory=bases)
    train(dense, optimizer)
    for name, basis in bases.items():
        change = (mine.state_dict()[name] - before[name]).double()
        assert change.norm() > 1e-3
        assert (change @ basis.double()).norm() ** 2 <= 1e-6 * change.norm() ** 2
        assert torch.allclose(mine.state_dict()[name], dense.state_dict()[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_a_resumed_run_ends_with_the_same_bits(order, dtype):
    def start():
        model = active_mlp(dtype)
        return model, SparseMaskedAdamW(model.named_parameters(), lr=0.02)

    whole, its_optimizer = start()
    train(whole, its_optimizer, 3)
    saved = copy.deepcopy((whole.state_dict(), its_optimizer.state_dict()))
    train(whole, its_optimizer, 3)

    resumed, optimizer = start()
    loads = [lambda: resumed.load_state_dict(saved[0]), lambda: optimizer.load_state_dict(saved[1])]
    for load in loads if order == "model first" else loads[::-1]:
        load()
    train(resumed, optimizer, 3)
    for name, value in resumed.named_parameters():
        assert torch.equal(value, whole.get_parameter(name)), name


def test_state_of_the_dense_model_goes_on_with_leaves_and_other_masks():
    dense, its_optimizer = dense_twin(torch.float32, MASKS)
    train(dense, its_optimizer, 3)
    mine = active_mlp()
    mine.load_state_dict(dense.state_dict())
    names = ["0.active", "2.active"]
    optimizer = SparseMaskedAdamW([(name, mine.get_parameter(name)) for name in names], lr=0.02)
    state = its_optimizer.state_dict()
    state["state"] = {0: state["state"][0], 1: state["state"][2]}
    state["param_groups"][0] |= {"params": [0, 1], "param_names": names}
    optimizer.load_state_dict(state)
    train(mine, optimizer, 3)
    train(dense, its_optimizer, 3)
    for name, value in mine.state_dict().items():
        assert torch.allclose(value, dense.state_dict()[name], rtol=1e-6, atol=1e-6)

    # Rows 2 and 3 stay active and keep their moments.
    restore(mine)
    other = {"0.weight": RowMask([2, 3, 4], (32, 20)), "2.weight": COLUMNS}
    activate(mine, other)
    later = SparseMaskedAdamW([(name, mine.get_parameter(name)) for name in names], lr=0.02)
    later.load_state_dict(optimizer.state_dict())
    losses(mine, batches())
    with pytest.raises(
        ValueError, match=r"parameter '0.active': its loaded state was made under RowMask.*call set_masks"
    ):
        later.step()
    later.set_masks({})
    later.step()
    moments = later.state[mine[0].active]
    assert moments["exp_avg"].shape == mine[0].active.shape
    # Counts of the new row and of the two that were trained before; which is whose, "cohort" says.
    assert moments["step"][moments["cohort"].long()].tolist() == [7, 7, 1]


def test_any_other_optimizer_trains_with_write_back():
    model = active_mlp()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    optimizer.register_step_post_hook(lambda *_: write_back(model))
    dense, its_optimizer = dense_twin(torch.float32, MASKS)
    for each, step in ((model, optimizer), (dense, its_optimizer)):
        train(each, step)
    for name, value in model.state_dict().items():
        assert torch.allclose(value, dense.state_dict()[name], rtol=1e-5, atol=1e-5)
    assert not torch.equal(before["0.weight"], model.state_dict()["0.weight"])


def test_restore_gives_back_the_model_as_it_was():
    model = mlp()
    model[0].bias.requires_grad_(False)
    model.extend([nn.Linear(20, 20), nn.Linear(20, 20)])
    model[4].weight = model[3].weight
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    parts = [(name, module, type(module)) for name, module in model.named_modules()]
    params = [(name, param, param.requires_grad) for name, param in model.named_parameters(remove_duplicate=False)]
    model[2].weight.grad = torch.ones(20, 32)
    activate(model, MASKS)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.active", "2.active"]
    assert all(p.grad is None for p in model.parameters())
    model(torch.randn(2, 20))
    restore(model)
    assert calls == [1]
    assert [(name, module, type(module)) for name, module in model.named_modules()] == parts
    after = [(name, param, param.requires_grad) for name, param in model.named_parameters(remove_duplicate=False)]
    assert all(a == c and b is d and e == f for (a, b, e), (c, d, f) in zip(params, after, strict=True)), (
        "parameters are others than before"
    )
    assert vars(model[0]).keys() == vars(nn.Linear(1, 1)).keys()
    restore(model)


def test_masks_without_entries_leave_their_layer_frozen():
    model = active_mlp(masks={"0.weight": RowMask([], (32, 20)), "2.weight": COLUMNS})
    assert type(model[0]) is nn.Linear and type(model[2]) is ActiveLinear
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["2.active"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.up, self.head = nn.Embedding(32, 20), nn.Linear(20, 20), nn.Linear(20, 32, bias=False)
        self.head.weight = self.embedding.weight


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(32, 20))


def quantized():
    class Linear4bit(nn.Linear):
        pass

    return nn.Sequential(Linear4bit(20, 32))


def patched():
    model = mlp()
    model[0].forward = model[0].forward
    return model


REFUSED = {
    "nothing": (mlp, {}, ValueError, "no entry of 0 masks is active"),
    "only empty masks": (mlp, {"0.weight": RowMask([], (32, 20))}, ValueError, "no entry of 1 masks is active"),
    "other shape": (
        mlp,
        {"2.weight": COLUMNS, "0.weight": COLUMNS},
        ValueError,
        r"masks: '0.weight' has shape \(32, 20\), but its mask is",
    ),
    "elements": (
        mlp,
        {"0.weight": ElementMask(ROWS.to_dense())},
        TypeError,
        r"'0.weight': expected a RowMask or a ColumnMask, got ElementMask; use SparseMaskedAdamW\(masks=",
    ),
    "2:4": (
        mlp,
        {"0.weight": TwoFourMask(torch.tensor([True, False, True, False]).repeat(32, 5))},
        TypeError,
        "got TwoFourMask; use Sparse",
    ),
    "no mask": (
        mlp,
        {"2.weight": COLUMNS, "0.weight": [1, 2]},
        TypeError,
        "'0.weight': expected a RowMask or a ColumnMask, got list",
    ),
    "no mapping": (mlp, [ROWS], TypeError, "masks: expected {name of a weight: mask}, got list"),
    "unknown name": (
        mlp,
        {"2.weight": COLUMNS, "0.wieght": ROWS},
        ValueError,
        "no parameter '0.wieght'; is it '0.weight'",
    ),
    "module": (mlp, {"0": ROWS}, ValueError, "no parameter '0'"),
    "bias": (
        mlp,
        {"2.weight": COLUMNS, "0.bias": RowMask([1], (32,))},
        TypeError,
        "'0.bias' belongs to a Linear; expected the weight of",
    ),
    "embedding": (Tied, {"embedding.weight": ROWS}, TypeError, "belongs to a Embedding; expected"),
    "tied": (Tied, {"head.weight": ROWS}, ValueError, "'head.weight' is tied to 'embedding.weight'"),
    "Conv1D": (conv1d, {"0.weight": COLUMNS}, TypeError, r"a Conv1D, whose weight is \(in, out\); expected .*masks="),
    "subclass": (quantized, {"0.weight": ROWS}, TypeError, "belongs to a Linear4bit"),
    "replaced forward": (patched, {"0.weight": ROWS}, TypeError, "'0.weight': the forward of its layer was replaced"),
    "twice": (active_mlp, MASKS, ValueError, r"'0' is an ActiveLinear already; call restore\(model\) first"),
}


@pytest.mark.parametrize("make, masks, error, message", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_and_changes_nothing(make, masks, error, message):
    model = make()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = [(name, type(module)) for name, module in model.named_modules()]
    flags = [param.requires_grad for param in model.parameters()]
    with pytest.raises(error, match=message):
        activate(model, masks)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert [param.requires_grad for param in model.parameters()] == flags
    assert all(param.grad is not None for param in model.parameters())


def test_an_optimizer_refuses_masks_of_active_layers_and_leaves_of_restored_ones():
    model = active_mlp()
    for name in ("0.weight", "0.active"):
        with pytest.raises(ValueError, match="is of an ActiveLinear, which has a mask of its own"):
            SparseMaskedAdamW(model.named_parameters(), masks={name: ROWS})
    optimizer = SparseMaskedAdamW(model.named_parameters())
    train(model, optimizer, 1)
    weight = model[0].weight.clone()
    restore(model)
    with pytest.raises(
        ValueError, match="parameter '0.active': it was the leaf of an ActiveLinear that has been restored"
    ):
        optimizer.step()
    assert torch.equal(model[0].weight, weight)


def test_values_put_elsewhere_are_stepped_from_there():
    """What .to() and the like do to a leaf."""
    model, other = active_mlp(), active_mlp()
    optimizers = [SparseMaskedAdamW(m.named_parameters(), lr=0.02) for m in (model, other)]
    for each, optimizer in zip((model, other), optimizers, strict=True):
        train(each, optimizer, 2)
    model.double().float()
    model[0].active.data = model[0].active.data.clone()
    for each, optimizer in zip((model, other), optimizers, strict=True):
        train(each, optimizer, 2)
    for name, value in model.named_parameters():
        assert torch.equal(value, other.get_parameter(name)), name
    assert model[0].active.data_ptr() == optimizers[0].state[model[0].active]["master"].data_ptr()
