"""State that is saved, loaded, pickled and copied, and goes on bit for bit."""

import copy
import io
import pickle
import zlib

import pytest
import torch
from cases.optimizers import as_bytes, random_mask
from torch import nn
from torch.optim import AdamW

from sparse_cl import ColumnMask, ElementMask, RowMask, SparseMaskedAdamW

SHAPES = {"up": (6, 8), "down": (8, 12), "bias": (5,), "conv": (4, 2, 3), "head": (4, 4), "scale": ()}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def masks(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {
        "up": RowMask([0, 2, 5], SHAPES["up"], gain=[0.5, 1.0, 2.0]),
        "down": random_mask("two_four", SHAPES["down"], 0.5, rng),
        "conv": random_mask("elements", SHAPES["conv"], 0.6, rng),
        "head": RowMask([], SHAPES["head"]),
    }


def make(dtype=torch.float32, its_masks=None, **options):
    rng = torch.Generator().manual_seed(0)
    params = {name: nn.Parameter(torch.randn(shape, generator=rng).to(dtype)) for name, shape in SHAPES.items()}
    return params, SparseMaskedAdamW(params.items(), masks=masks() if its_masks is None else its_masks, **options)


def train(params, opt, steps, seed=0):
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params.values():
            p.grad = torch.randn(p.shape, generator=rng).to(p.dtype)
        opt.step()


def with_history(dtype=torch.float32, **options):
    """An optimizer whose entries differ in their step counts."""
    params, opt = make(
        dtype, {**masks(seed=7), "bias": RowMask([1, 2], (5,)), "up": RowMask([0, 1], (6, 8))}, **options
    )
    train(params, opt, 3)
    opt.set_masks(masks())
    train(params, opt, 2, seed=1)
    assert any("cohort" in state for state in opt.state.values())
    return params, opt


def saved(thing, weights_only=True):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def same_states(a, b):
    """Whether the states of two optimizers are equal in every byte, dtype and shape."""
    ours, theirs = a.state_dict()["state"], b.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for i, state in ours.items():
        assert state.keys() == theirs[i].keys()
        for name, value in state.items():
            other = theirs[i][name]
            if isinstance(value, bytes):
                if value != other:
                    return False
            elif (
                value.dtype != other.dtype
                or value.shape != other.shape
                or not torch.equal(as_bytes(value), as_bytes(other))
            ):
                return False
    return True


def same_params(a, b):
    return all(torch.equal(as_bytes(a[name]), as_bytes(b[name])) for name in a)


def go_on(*pairs):
    """Trains all, and checks that they stay equal to the first."""
    for params, opt in pairs:
        train(params, opt, 3, seed=2)
    (params, opt), *others = pairs
    for other_params, other in others:
        assert same_params(params, other_params)
        assert same_states(opt, other)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"master_weights": False}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_saved_state_is_loaded_exactly_and_goes_on_bit_for_bit(implementation, dtype, options):
    params, opt = with_history(dtype, **options)
    state = saved(opt.state_dict())
    others, other = make(dtype, **options)
    with torch.no_grad():
        for name, p in others.items():
            p.copy_(params[name])
    other.load_state_dict(state)
    assert same_states(opt, other)
    assert all(
        v.dtype in (torch.int32, torch.int64, torch.uint8, torch.float32, dtype)
        for s in other.state.values()
        for v in s.values()
    )
    go_on((params, opt), (others, other))
    # What was loaded from is not the optimizer's memory.
    assert not torch.equal(state["state"][0]["step"], opt.state[params["up"]]["step"])


def test_a_state_dict_is_plain_and_as_small_as_the_state():
    _, opt = with_history()
    state = opt.state_dict()
    assert all(isinstance(v, torch.Tensor | bytes) for s in state["state"].values() for v in s.values())
    file = io.BytesIO()
    torch.save(state["state"], file)
    tensors = sum(len(s) for s in state["state"].values())
    assert file.tell() < opt.state_bytes() + 400 * tensors + 2000
    names = [set(s) for s in state["state"].values()]
    assert {"step", "rows", "gain", "exp_avg", "exp_avg_sq", "counts"} in names
    assert {"step", "bits", "ranks", "exp_avg", "exp_avg_sq", "counts"} in names
    assert len(names) == len(SHAPES) - 1


def test_loading_before_the_first_step_and_into_a_running_optimizer():
    params, opt = make()
    empty = saved(opt.state_dict())
    train(params, opt, 2)
    opt.load_state_dict(empty)
    assert not any(opt.state.values())
    train(params, opt, 1)
    assert opt.state[params["up"]]["step"].item() == 1
    # Groups come from the checkpoint.
    empty["param_groups"][0]["lr"] = 0.25
    opt.load_state_dict(empty)
    assert opt.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_copies_are_independent_and_go_on_bit_for_bit(implementation, how, dtype):
    pair = with_history(dtype, amsgrad=True)
    ways = {
        "pickle": lambda x: pickle.loads(pickle.dumps(x)),
        "deepcopy": copy.deepcopy,
        "torch.save": lambda x: saved(x, weights_only=False),
    }
    twin = ways[how](pair)
    assert same_states(pair[1], twin[1])
    assert twin[1].masks == pair[1].masks
    before = copy.deepcopy(twin[1].state_dict())
    train(*pair, 1, seed=5)
    assert same_states(twin[1], loaded_from(before))
    train(*twin, 1, seed=5)
    go_on(pair, twin)


def loaded_from(state):
    class Holder:
        def state_dict(self):
            return state

    return Holder()


def test_a_copy_can_change_its_masks_at_once():
    pair = with_history()
    twin = copy.deepcopy(pair)
    for params, opt in (pair, twin):
        opt.set_masks({"up": ColumnMask([0, 7], SHAPES["up"])})
        assert params["up"] in opt.state
    go_on(pair, twin)


def test_pickling_writes_each_tensor_once():
    _, opt = make()
    big = nn.Parameter(torch.ones(400, 100))
    opt = SparseMaskedAdamW([big], amsgrad=True)
    big.grad = torch.ones_like(big)
    opt.step()
    assert len(pickle.dumps(opt)) < opt.state_bytes() + big.nbytes + 10_000


def test_the_state_of_adamw_is_taken_over(implementation):
    for amsgrad in (False, True):
        theirs = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
        old = AdamW(theirs.items(), lr=0.1, amsgrad=amsgrad, foreach=False)
        train(theirs, old, 3)
        mine = {name: nn.Parameter(p.detach().clone()) for name, p in theirs.items()}
        opt = SparseMaskedAdamW(mine.items())
        opt.load_state_dict(saved(old.state_dict()))
        assert opt.param_groups[0]["lr"] == 0.1
        assert opt.param_groups[0]["master_weights"] is True
        train(mine, opt, 3, seed=1)
        train(theirs, old, 3, seed=1)
        for name, p in mine.items():
            torch.testing.assert_close(p, theirs[name], rtol=1e-5, atol=1e-6)
            assert opt.state[p]["step"].item() == 6


def test_the_state_of_adamw_goes_into_masks_by_set_masks():
    theirs = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    old = AdamW(theirs.items())
    train(theirs, old, 3)
    params, opt = make()
    opt.load_state_dict(old.state_dict())
    with pytest.raises(ValueError, match="parameter 'up': its loaded state was made under no mask"):
        train(params, opt, 1)
    opt.set_masks(masks())
    assert torch.equal(opt.state[params["up"]]["exp_avg"], old.state[theirs["up"]]["exp_avg"][[0, 2, 5]])
    train(params, opt, 1)
    assert opt.state[params["up"]]["step"].item() == 4


def other_masks():
    return {**masks(), "up": RowMask([0, 3], SHAPES["up"])}


@pytest.mark.parametrize("way", ["load", "copied"])
def test_loading_into_other_masks_is_refused_by_name_until_set_masks(way):
    state = copy.deepcopy(with_history()[1].state_dict())
    params, opt = make(its_masks=other_masks())
    opt.load_state_dict(state)
    if way == "copied":
        params, opt = copy.deepcopy((params, opt))
    before = {name: p.detach().clone() for name, p in params.items()}
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"parameter 'up': its loaded state was made under RowMask\(.*call set_masks"
        ):
            train(params, opt, 1)
    assert same_params(params, before)
    assert torch.equal(opt.state[params["up"]]["exp_avg"], state["state"][0]["exp_avg"])
    opt.set_masks(other_masks())
    assert torch.equal(opt.state[params["up"]]["exp_avg"][0], state["state"][0]["exp_avg"][0])
    assert not opt.state[params["up"]]["exp_avg"][1].any()
    train(params, opt, 1)


@pytest.mark.parametrize(
    "changed",
    [
        {"up": RowMask([0, 2, 5], SHAPES["up"])},
        {"up": RowMask([0, 2, 5], SHAPES["up"], gain=[0.5, 1.0, 3.0])},
        {"up": ElementMask(masks()["up"].to_dense())},
        {"bias": RowMask([0], SHAPES["bias"])},
        {"scale": ElementMask(torch.tensor(False))},
        {"conv": RowMask([0], SHAPES["conv"])},
    ],
    ids=["gain lost", "other gain", "other kind", "masked now", "closed now", "other entries"],
)
def test_every_difference_of_masks_is_seen(changed):
    state = copy.deepcopy(with_history()[1].state_dict())
    params, opt = make(its_masks={**masks(), **changed})
    opt.load_state_dict(state)
    (name,) = changed
    with pytest.raises(ValueError, match=f"parameter '{name}'"):
        train(params, opt, 1)


def test_loading_again_or_the_right_state_clears_the_refusal():
    params, opt = make(its_masks=other_masks())
    train(params, opt, 1)
    right = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(with_history()[1].state_dict())
    opt.load_state_dict(right)
    train(params, opt, 1)
    for i, state in opt.state_dict()["state"].items():
        assert torch.equal(state["step"], right["state"][i]["step"] + 1)


def spoil(name, value):
    return lambda state: state["state"][0].__setitem__(name, value)


@pytest.mark.parametrize(
    "edit, message",
    [
        (spoil("exp_avg", torch.zeros(2, 8)), "'up': exp_avg: expected shape"),
        (spoil("exp_avg_sq", torch.zeros(24)), "'up': exp_avg_sq: expected shape"),
        (spoil("gain", torch.zeros(1)), "'up': gain: expected shape"),
        (spoil("step", torch.zeros(3)), "'up': step: expected one count"),
        (spoil("cohort", torch.zeros(2, dtype=torch.uint8)), "'up': cohort: expected shape"),
        (spoil("counts", torch.zeros(2)), "'up': counts: expected bytes, got Tensor"),
        (spoil("counts", b"no zlib"), "'up': counts: not readable"),
        (spoil("counts", zlib.compress(b"")), "'up': counts: expected 1 to 256 counts .* got 0 bytes for 0"),
        (spoil("counts", zlib.compress(b"\2\0" + b"\1\0\0\0" * 2)), "'up': cohort: expected shape"),
        (spoil("counts", zlib.compress(b"\2\0" + b"\1\0\0\0")), "'up': counts: expected 1 to 256"),
        (spoil("counts", zlib.compress(b"\1\0\1\0\0\0\0\1\0")), "'up': cohort: expected numbers below 1"),
        (spoil("cohort", torch.ones(3, dtype=torch.uint8)), "'up': cohort: expected numbers below 1"),
        (lambda state: state["state"][0].pop("step"), "'up': state has no step"),
        (lambda state: state["state"][0].pop("exp_avg"), "'up': state has no exp_avg"),
        (lambda state: state["state"][3].pop("ranks"), "'conv': state has no ranks"),
        (lambda state: state["param_groups"].append(state["param_groups"][0]), "different number of parameter groups"),
        (lambda state: state["param_groups"][0]["params"].append(9), "doesn't match the size of optimizer's group"),
    ],
)
def test_a_malformed_state_is_refused_and_changes_nothing(edit, message):
    params, opt = make()
    train(params, opt, 2)
    state = copy.deepcopy(opt.state_dict())
    edit(state)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert same_states(opt, loaded_from(before))
    twin_params, twin = make()
    train(twin_params, twin, 2)
    go_on((twin_params, twin), (params, opt))
