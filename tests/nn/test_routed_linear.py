"""RoutedLinear against the dense formula by autograd in float64, and its file."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_cl.nn import RoutedLinear, load_routed, route, routed_layers, save_routed, unroute


def routed(n=7, m=5, k=3, dtype=torch.float64, rank=None, routing="top", open=None, seed=0, bias=True):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(n, m, bias=bias, dtype=dtype))
    route(model, {"0": open}, k, rank=rank, routing=routing)
    with torch.no_grad():
        model[0].columns.normal_()
        if model[0].mix is not None:
            model[0].mix.normal_()
    return model


def dense(layer, x):
    """The formula: W h + b + ΔW (h ⊙ m(h)), with ΔW and the mask written out."""
    columns = layer.columns if layer.mix is None else layer.columns @ layer.mix.mT
    allowed = torch.zeros(layer.in_features, dtype=torch.bool)
    allowed[layer.open] = True
    flat = x.reshape(-1, x.shape[-1])
    mask = torch.zeros(flat.shape, dtype=torch.bool)
    for row, values in enumerate(flat.detach().abs()):
        order = sorted((i for i in range(len(values)) if allowed[i]), key=lambda i: -float(values[i]))
        mask[row, order if layer.routing == "none" else order[: layer.k]] = True
    branch = (flat * mask).to(columns.dtype) @ columns
    return nn.functional.linear(x, layer.weight, layer.bias) + branch.view(*x.shape[:-1], -1).to(x.dtype)


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 9), st.sampled_from([None, 1, 3]), st.booleans(), st.data())
def test_values_and_gradients_are_those_of_the_dense_formula(n, m, k, rank, plain, data):
    k, rank = min(k, n), None if rank is None else min(rank, n)
    open = data.draw(st.none() | st.sets(st.integers(0, n - 1), min_size=1).map(lambda s: torch.tensor(sorted(s))))
    model = routed(n, m, k, rank=rank, open=open, routing="none" if plain else "top", seed=n * m)
    layer = model[0]
    x = torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, m, dtype=torch.float64)
    wanted = [x, layer.weight, layer.bias, layer.columns] + ([] if layer.mix is None else [layer.mix])
    found = torch.autograd.grad((model(x) * weight).sum(), wanted)
    expected = torch.autograd.grad((dense(layer, x) * weight).sum(), wanted)
    torch.testing.assert_close(model(x), dense(layer, x), rtol=1e-12, atol=1e-12)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_column_learns_only_from_tokens_that_choose_its_input_and_acts_on_no_other():
    layer = routed(n=16, m=4, k=2)[0]
    x = torch.randn(9, 16, dtype=torch.float64)
    chosen = layer.chosen(x)
    layer(x[:4]).square().sum().backward()
    used = torch.zeros(16, dtype=torch.bool)
    used[chosen[:4].flatten()] = True
    assert torch.equal(layer.columns.grad.any(1), used)
    before = layer(x).detach()
    with torch.no_grad():
        layer.columns[used] += 1
    moved = (layer(x) - before).abs().amax(1) > 0
    assert torch.equal(moved, used[chosen].any(1))


def gated(n=5, m=9, k=3, rank=None, routing="top", open=None, seed=0):
    """gate and up, both routed by their outputs, and what they would be without a branch."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({name: nn.Linear(n, m, dtype=torch.float64) for name in ("gate", "up")})
    route(model, dict.fromkeys(model, open), k, rank=rank, routing=routing, side="outputs", follow={"up": "gate"})
    with torch.no_grad():
        for layer in model.values():
            layer.columns.normal_()
            if layer.mix is not None:
                layer.mix.normal_()
    return model


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.sampled_from([None, 1, 3]), st.booleans(), st.data())
def test_gate_and_up_run_through_the_rows_that_the_gate_opens(n, m, k, rank, plain, data):
    k, rank = min(k, m), None if rank is None else min(rank, m)
    open = data.draw(st.none() | st.sets(st.integers(0, m - 1), min_size=1).map(lambda s: torch.tensor(sorted(s))))
    model = gated(n, m, k, rank, "none" if plain else "top", open, seed=n * m)
    x = torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True)
    z = {name: nn.functional.linear(x, layer.weight, layer.bias) for name, layer in model.items()}
    allowed = list(range(m)) if open is None else open.tolist()
    mask = torch.zeros(2, 3, m, dtype=torch.float64)
    for token in ((i, j) for i in range(2) for j in range(3)):
        order = sorted(allowed, key=lambda unit: -float(z["gate"][token][unit].detach()))
        mask[token][order if plain else order[:k]] = 1
    deltas = {name: x_.columns if x_.mix is None else x_.columns @ x_.mix.mT for name, x_ in model.items()}
    expected = [z[name] + mask * (x @ deltas[name].mT) for name in model]
    found = [layer(x) for layer in model.values()]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = [x, *model.parameters()]
    weight = torch.randn(2, 3, m, dtype=torch.float64)
    pairs = (torch.autograd.grad((one[0].sigmoid() * one[1] * weight).sum(), wanted) for one in (found, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_follower_is_written_and_read_with_its_leader(tmp_path):
    model, other = gated(rank=2), nn.ModuleDict({name: nn.Linear(5, 9, dtype=torch.float64) for name in ("up", "gate")})
    other.load_state_dict(model.state_dict(), strict=False)
    save_routed(model, tmp_path / "branch")
    load_routed(other, tmp_path / "branch")
    x = torch.randn(4, 5, dtype=torch.float64)
    assert other["up"].leader is other["gate"] and list(dict(other.named_modules())) == ["", "up", "gate"]
    for name in ("gate", "up"):
        assert torch.equal(other[name](x), model[name](x))
    unroute(other)
    assert not vars(other["up"]).keys() - vars(nn.Linear(1, 1)).keys()


def test_a_leader_may_follow_another_and_is_read_again(tmp_path):
    models = [nn.ModuleDict({name: nn.Linear(5, 9) for name in "abc"}) for _ in range(2)]
    route(models[0], dict.fromkeys("abc"), 3, side="outputs", follow={"a": "b", "b": "c"})
    save_routed(models[0], tmp_path / "branch")
    load_routed(models[1], tmp_path / "branch")
    found = [models[1][name].leader for name in "abc"]
    assert found == [models[1]["b"], models[1]["c"], None]


@pytest.mark.parametrize("tokens", [2, 4])
def test_a_follower_that_runs_first_is_refused_and_takes_no_choice_of_other_tokens(tokens):
    model, x = gated(), torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="follow: a layer ran before its leader"):
        model["up"](x)
    for batch in (x, x[:1]):
        model["gate"](batch), model["up"](batch)
    model["gate"](x[:tokens]), model["up"](x[:tokens])
    with pytest.raises(RuntimeError, match="follow: a layer ran before its leader"):
        model["up"](x)


@pytest.mark.parametrize(
    ("follow", "side", "message"),
    [
        ({"up": "gate"}, "inputs", "follow: expected layers that are routed here by their outputs, got 'up', side='in"),
        ({"down": "gate"}, "outputs", "follow: expected layers that are routed here by their outputs, got 'down'"),
        ({"up": "down"}, "outputs", "follow: 'up' is to follow 'down', which is not routed by its outputs"),
        ({"up": "up"}, "outputs", "follow: 'up' is to follow 'up'"),
        ({"up": "odd"}, "outputs", "follow: 'up' has 9 outputs, but its leader 'odd' has 8"),
        ({}, "left", "side: expected 'inputs', 'outputs', got 'left'"),
    ],
)
def test_a_leader_that_does_not_lead(follow, side, message):
    sizes = {"gate": (5, 9), "up": (5, 9), "odd": (5, 8), "down": (9, 5)}
    model = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})
    with pytest.raises(ValueError, match=message):
        route(model, {"gate": None, "up": None, "odd": None}, 2, side=side, follow=follow)
    assert all(type(layer) is nn.Linear for layer in model.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_a_layer_computes_does_not_change_when_it_is_routed_or_no_more(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, dtype=dtype), nn.ReLU(), nn.Linear(6, 2, dtype=dtype))
    x, objects = torch.randn(5, 8, dtype=dtype), list(model)
    before = model(x)
    route(model, {"0": None, "2": torch.tensor([5, 1])}, 2, rank=2)
    assert torch.equal(model(x), before)
    assert list(model) == objects
    assert model[0].columns.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert model[0].columns.any() and not model[0].mix.any()
    model(x).float().sum().backward()
    assert list(routed_layers(model)) == ["0", "2"]
    unroute(model)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_under_autocast_the_branch_keeps_its_precision():
    model = routed(n=32, m=16, k=4, dtype=torch.float32)
    x = torch.randn(6, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), dense(model[0], x), rtol=3e-2, atol=3e-2)


def test_random_routing_chooses_as_many_open_inputs_anew_each_time():
    layer = routed(n=40, k=5, routing="random", open=torch.arange(0, 40, 2))[0]
    x = torch.randn(2000, 40, dtype=torch.float64)
    first, second = layer.chosen(x), layer.chosen(x)
    assert not torch.equal(first, second)
    assert first.shape == (2000, 5)
    assert all(len(set(row)) == 5 for row in first.tolist())
    counts = first.flatten().bincount(minlength=40)
    assert not counts[1::2].any()
    assert ((counts[::2] - 500).abs() < 5 * 500**0.5).all()


def test_written_and_read(tmp_path):
    model, other = routed(rank=2), nn.Sequential(nn.Linear(7, 5, dtype=torch.float64))
    other.load_state_dict(model.state_dict(), strict=False)
    save_routed(model, tmp_path / "branch")
    x = torch.randn(4, 7, dtype=torch.float64)
    for _ in range(2):  # the second time it replaces the branch
        load_routed(other, tmp_path / "branch")
        assert torch.equal(other(x), model(x))
        assert (other[0].k, other[0].routing) == (3, "top")
    wrong = nn.Sequential(nn.Linear(6, 5))
    for given_, message in (
        (wrong, r"'0' wants columns of shape \(6, 2\), got \(7, 2\); the file is of another model"),
        (
            nn.Sequential(nn.Linear(7, 1)),
            r"'0' wants mix of shape \(1, 2\), got \(5, 2\); the file is of another model",
        ),
        (nn.Sequential(), "the model has no module '0', which has a routed branch there"),
    ):
        with pytest.raises(ValueError, match=message):
            load_routed(given_, tmp_path / "branch")
    assert type(wrong[0]) is nn.Linear
    for kind in (nn.ReLU(), nn.modules.linear.NonDynamicallyQuantizableLinear(7, 5)):
        mixed = nn.Sequential(kind, nn.Linear(2, 2))
        route(mixed, {"1": None}, 1)
        with pytest.raises(TypeError, match=f"'0' is a {type(kind).__name__}, expected an nn.Linear"):
            load_routed(mixed, tmp_path / "branch")
        assert isinstance(mixed[1], RoutedLinear), "what the model had stays"
    with pytest.raises(ValueError, match="no layer has a routed branch"):
        save_routed(wrong, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("open", [torch.tensor([1, 2, 4]), torch.tensor([0, 3, 6])])
def test_a_state_dict_brings_the_inputs_that_are_open(open):
    model, other = routed(open=open), routed(open=torch.tensor([0, 1, 5]), seed=1)
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 7, dtype=torch.float64)
    assert torch.equal(other(x), model(x))
    with pytest.raises(RuntimeError, match="size mismatch for 0.open"):
        routed().load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({"1": None}, 2), ValueError, "layers: the model has no module '1'"),
        (({}, 2), ValueError, "layers: expected the name of a linear layer at least, got none"),
        (({"": None}, 2), TypeError, "layers: '' is a Sequential, expected an nn.Linear"),
        (({"0": None}, 0), ValueError, "k: expected an integer from 1 to 7, the inputs of '0', got 0"),
        (({"0": None}, 8), ValueError, "k: expected an integer from 1 to 7, the inputs of '0', got 8"),
        (({"0": None}, 0.5 * 7), ValueError, "k: expected an integer from 1 to 7, the inputs of '0', got 3.5"),
        (({"0": torch.tensor([1, 1])}, 2), ValueError, "'0' has inputs 0 to 6; expected some of these, each once"),
        (({"0": torch.tensor([7])}, 2), ValueError, "'0' has inputs 0 to 6; expected some of these, each once"),
        (({"0": torch.tensor([], dtype=torch.int64)}, 2), ValueError, "'0' has inputs 0 to 6; expected some"),
    ],
)
def test_bad_input(arguments, error, message):
    model = nn.Sequential(nn.Linear(7, 5))
    with pytest.raises(error, match=message):
        route(model, *arguments)
    assert type(model[0]) is nn.Linear
    model[0].forward = model[0].forward  # as accelerate's hooks replace it
    with pytest.raises(TypeError, match="layers: '0': the forward of this layer was replaced on the object"):
        route(model, {"0": None}, 2)
    del model[0].forward
    for name, value, words in (("rank", 8, "rank: expected None or 1 to 7"), ("routing", "best", "routing: expected")):
        with pytest.raises(ValueError, match=words):
            route(model, {"0": None}, 2, **{name: value})
    route(model, {"0": None}, 2)
    with pytest.raises(TypeError, match=r"'0' is a RoutedLinear, expected an nn.Linear; call unroute\(model\) first"):
        route(model, {"0": None}, 2)
    assert isinstance(model[0], RoutedLinear)
