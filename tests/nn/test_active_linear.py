"""ActiveLinear beside nn.Linear: the same function, and of its gradient the active part."""

import copy
import gc
import shutil

import pytest
import torch
from cases.active_mlp import COLUMNS, ROWS, active_mlp, batches, losses, mlp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_cl import ColumnMask, RowMask, SparseMaskedAdamW
from sparse_cl.nn import ActiveLinear, activate, restore, write_back

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")


def part(mask, whole):
    """The compact entries of a whole matrix, by another way than the code's."""
    return whole[mask.to_dense()].view(mask.layout().compact_shape)


@st.composite
def layers(draw):
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    kind = draw(st.sampled_from((RowMask, ColumnMask)))
    units = st.integers(0, (rows if kind is RowMask else columns) - 1)
    mask = kind(sorted(draw(st.sets(units, min_size=1))), (rows, columns))
    lead = draw(st.lists(st.integers(0, 5), max_size=3))
    return mask, tuple(lead), draw(st.booleans()), draw(st.integers(0, 99))


@given(layers())
def test_output_and_gradients_are_those_of_linear_on_the_active_part(layer):
    mask, lead, bias, seed = layer
    torch.manual_seed(seed)
    plain = nn.Linear(mask.shape[1], mask.shape[0], bias=bias)
    mine = copy.deepcopy(plain)
    activate(mine, {"weight": mask})
    x = torch.randn(*lead, mask.shape[1])
    grad = torch.randn(*lead, mask.shape[0])
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(each) for module, each in zip((plain, mine), inputs, strict=True)]
    assert torch.equal(*outputs)
    for y in outputs:
        y.backward(grad)
    # A single vector goes by other kernels, so not to the bit.
    assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-6, atol=1e-6)
    assert mine.weight.grad is None and (not bias or mine.bias.grad is None)
    # The oracle is in float64.
    exact = grad.double().reshape(-1, mask.shape[0]).T @ x.double().reshape(-1, mask.shape[1])
    assert mine.active.grad.shape == mask.layout().compact_shape
    assert torch.allclose(mine.active.grad.double(), part(mask, exact), rtol=1e-6, atol=2e-6)


def errors_of_weight_gradients(dtype, **options):
    """Errors against float64 of the leaves' gradients, and of nn.Linear's on the active part."""
    models = {"mine": active_mlp(dtype), "linear": mlp(dtype), "exact": mlp(torch.float64)}
    for name, model in models.items():
        inputs = batches(torch.float64 if name == "exact" else dtype)
        losses(model, inputs, **({} if name == "exact" else options))
    for mine, linear, exact in zip(*models.values(), strict=True):
        if isinstance(mine, ActiveLinear):
            true = part(mine.mask, exact.weight.grad)
            wrong, theirs = mine.active.grad.double() - true, part(mine.mask, linear.weight.grad).double() - true
            yield mine, (wrong.norm() / true.norm()).item(), (theirs.norm() / true.norm()).item()


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["kept", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_accumulated_gradients_are_as_exact_as_linears(dtype, autocast, checkpointing):
    """1e-6 in float32; in bfloat16 at most twice the error that nn.Linear has."""
    for layer, error, theirs in errors_of_weight_gradients(dtype, autocast=autocast, checkpointing=checkpointing):
        narrow = dtype == torch.bfloat16 or (autocast and dtype != torch.float64)
        assert error <= (2 * theirs if narrow else 1e-6)
        assert layer.active.grad.dtype == layer.active.dtype == (dtype if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    "backend, autocast",
    [("eager", None), ("aot_eager", torch.bfloat16), pytest.param("inductor", None, marks=needs_compiler)],
)
def test_compiles_whole(backend, autocast):
    torch._dynamo.reset()
    plain, compiled = active_mlp(), active_mlp()
    losses(plain, batches(), autocast)
    losses(torch.compile(compiled, backend=backend, fullgraph=True), batches(), autocast)
    for mine, theirs in ((plain[0], compiled[0]), (plain[2], compiled[2])):
        difference = (mine.active.grad - theirs.active.grad).norm() / mine.active.grad.norm()
        assert difference < (2e-2 if autocast else 1e-6)


def test_a_compiled_model_sees_what_the_optimizer_wrote():
    torch._dynamo.reset()
    model = active_mlp()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = SparseMaskedAdamW(model.named_parameters(), lr=0.1)
    for x in batches(count=4):
        compiled(x).square().mean().backward()
        optimizer.step()
        assert torch.allclose(compiled(x), model(x), atol=1e-6)


def test_gradients_of_gradients():
    torch.manual_seed(0)
    for mask in (RowMask([1, 3], (5, 4)), ColumnMask([0, 2], (5, 4))):
        layer = ActiveLinear(4, 5, mask=mask, dtype=torch.float64)
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

        def forward(x, active, layer=layer):
            return torch.func.functional_call(layer, {"active": active}, (x,)).square()

        # By finite differences of the whole weight, since the leaf is no part of the forward pass.
        loss = forward(x, layer.active).sum()
        grad = torch.autograd.grad(loss, layer.active, create_graph=True)[0]
        second = torch.autograd.grad(grad.square().sum(), x)[0]
        plain = nn.Linear(4, 5, dtype=torch.float64)
        plain.load_state_dict(layer.state_dict())
        loss = plain(x).square().sum()
        whole = torch.autograd.grad(loss, plain.weight, create_graph=True)[0]
        assert torch.allclose(second, torch.autograd.grad(part(mask, whole).square().sum(), x)[0])


@pytest.mark.parametrize("mask", [RowMask([1, 3], (5, 4)), ColumnMask([0, 2], (5, 4))], ids=["rows", "columns"])
def test_a_penalty_on_the_gradient_of_the_input_reaches_the_weight(mask):
    torch.manual_seed(0)
    layer, plain = ActiveLinear(4, 5, mask=mask, dtype=torch.float64), nn.Linear(4, 5, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    found = []
    for module, leaf in ((layer, layer.active), (plain, plain.weight)):
        (slope,) = torch.autograd.grad(module(x).tanh().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), leaf)[0])
    assert torch.allclose(found[0], part(mask, found[1]))


def test_a_bias_that_is_unfrozen_learns_and_a_weight_that_is_unfrozen_is_refused():
    torch.manual_seed(0)
    layer, plain = ActiveLinear(4, 5, mask=RowMask([1], (5, 4))), nn.Linear(4, 5)
    plain.load_state_dict(layer.state_dict())
    layer.bias.requires_grad_(True)
    x = torch.randn(2, 3, 4)
    for module in (layer, plain):
        module(x).square().sum().backward()
    assert torch.allclose(layer.bias.grad, plain.bias.grad)
    layer.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"freeze it \(weight.requires_grad_\(False\)\), or call .*restore"):
        layer(x)
    with torch.no_grad():
        assert torch.allclose(layer(x), plain(x))


def test_a_shallow_copy_does_not_take_the_leaf_away():
    layer = ActiveLinear(4, 5, mask=RowMask([1], (5, 4)))
    other = copy.copy(layer)
    del other
    gc.collect()
    optimizer = SparseMaskedAdamW(layer.named_parameters(), lr=0.1)
    before = layer.weight.detach().clone()
    layer(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    assert (layer.weight != before).any(1).tolist() == [False, True, False, False, False]


def test_an_optimizer_copied_without_its_model_is_refused():
    layer = ActiveLinear(4, 5, mask=RowMask([1, 4], (5, 4)))
    optimizer = SparseMaskedAdamW(layer.named_parameters(), lr=0.1)
    layer(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    alone = copy.deepcopy(optimizer)
    leaf = alone.param_groups[0]["params"][-1]
    leaf.grad = torch.ones_like(leaf)
    with pytest.raises(ValueError, match=r"was made under RowMask.* but this optimizer has no mask"):
        alone.step()


def saved_bytes(model, x):
    """Bytes of activations kept for the backward pass, weights aside."""
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    del y
    return sum(kept.values())


def test_only_the_active_columns_of_the_input_are_kept():
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    x = torch.randn(100, 64)
    activate(model, {"0.weight": ColumnMask([1, 2, 3], (8, 64))})
    assert saved_bytes(model, x) == 100 * 3 * 4
    restore(model)
    activate(model, {"0.weight": RowMask([1], (8, 64))})
    assert saved_bytes(model, x) == x.nbytes
    model[0].active.requires_grad_(False)
    assert saved_bytes(model, x.clone().requires_grad_()) == 0


def test_a_narrow_leaf_gets_gradients_in_its_dtype():
    model = active_mlp(torch.bfloat16, leaf_dtype=torch.bfloat16)
    losses(model, batches(torch.bfloat16))
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"leaf_dtype: '0.weight' is torch.float32, so expected torch.float32, got"):
        active_mlp(leaf_dtype=torch.bfloat16)


def test_a_layer_made_directly_is_a_linear_layer_that_learns_in_part():
    torch.manual_seed(3)
    layer = ActiveLinear(20, 32, mask=ROWS)
    torch.manual_seed(3)
    plain = nn.Linear(20, 32)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["active"]
    assert "in_features=20, out_features=32, bias=True, mask=RowMask(80 of 640 active" in repr(layer)
    x = torch.randn(4, 20)
    assert torch.equal(layer(x), plain(x))
    restore(layer)
    assert type(layer) is nn.Linear and all(p.requires_grad for p in layer.parameters())
    with pytest.raises(ValueError, match="expected an active row or column"):
        ActiveLinear(20, 32, mask=RowMask([], (32, 20)))


def test_loading_sets_the_leaf_but_keeps_digits_that_the_weight_has_not():
    model = active_mlp(torch.bfloat16)
    other = {name: value + 1 for name, value in mlp(torch.bfloat16).state_dict().items()}
    assert model.state_dict().keys() == other.keys()
    model.load_state_dict(other)
    assert torch.equal(model[0].active, part(ROWS, other["0.weight"]).float())

    with torch.no_grad():
        model[0].active.mul_(1.0001)
        model[2].active.mul_(1.0001)
    digits = [model[i].active.clone() for i in (0, 2)]
    write_back(model)
    saved = model.state_dict()
    for assign in (False, True):
        model.load_state_dict(copy.deepcopy(saved), assign=assign)
        assert torch.equal(model[0].active, digits[0]) and torch.equal(model[2].active, digits[1])
    assert not any(p.requires_grad for name, p in model.named_parameters() if "active" not in name)


def test_moving_and_copying_take_the_leaf_along(tmp_path):
    model = active_mlp()
    copies = [copy.deepcopy(model), active_mlp().double().float()]
    torch.save(model, tmp_path / "model")
    copies.append(torch.load(tmp_path / "model", weights_only=False))
    for other in copies:
        optimizer = SparseMaskedAdamW(other.named_parameters(), lr=0.1)
        before = {name: value.clone() for name, value in other.state_dict().items()}
        losses(other, batches())
        optimizer.step()
        for i, mask in ((0, ROWS), (2, COLUMNS)):
            changed = other[i].weight != before[f"{i}.weight"]
            assert torch.equal(changed, mask.to_dense())
            assert torch.equal(part(mask, other[i].weight), other[i].active)
    for (name, value), (_, untouched) in zip(model.named_parameters(), active_mlp().named_parameters(), strict=True):
        assert torch.equal(value, untouched), name
