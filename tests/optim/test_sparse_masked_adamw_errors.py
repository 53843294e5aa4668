"""What SparseMaskedAdamW refuses: by name, and with everything as before."""

import pytest
import torch
from cases.optimizers import snapshot, unchanged
from torch import nn

from sparse_cl import ColumnMask, ElementMask, RowMask, SparseMaskedAdamW

SHAPE = (4, 8)


def named(count=3):
    return {name: nn.Parameter(torch.ones(SHAPE)) for name in "abcdef"[:count]}


def fill_grads(params):
    for p in params.values():
        p.grad = torch.ones_like(p)


OUT_OF_RANGE = [
    {"lr": -1e-3},
    {"lr": float("nan")},
    {"lr": torch.tensor(-1.0)},
    {"lr": torch.ones(2)},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, 1.0)},
    {"betas": (-0.1, 0.9)},
    {"betas": (0.9,)},
    {"betas": (0.9, float("nan"))},
    {"betas": (torch.ones(2), 0.9)},
    {"eps": -1e-8},
    {"eps": float("nan")},
    {"weight_decay": -0.1},
    {"weight_decay": float("nan")},
]


@pytest.mark.parametrize("options", OUT_OF_RANGE, ids=str)
def test_hyperparameters_out_of_range(options):
    params, (name,) = named(), options
    with pytest.raises(ValueError, match=f"{name}: expected"):
        SparseMaskedAdamW(params.values(), **options)
    with pytest.raises(ValueError, match=f"{name}: expected"):
        SparseMaskedAdamW([{"params": params.values(), **options}])
    opt = SparseMaskedAdamW([params["a"]])
    with pytest.raises(ValueError, match=f"{name}: expected"):
        opt.add_param_group({"params": [params["b"]], **options})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("options", [{"differentiable": True}, {"foreach": True}, {"fused": True}], ids=str)
def test_options_that_a_group_brings(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        SparseMaskedAdamW([{"params": [nn.Parameter(torch.ones(2))], **options}])


def test_unknown_arguments():
    with pytest.raises(TypeError, match="no argument 'momentum'"):
        SparseMaskedAdamW([nn.Parameter(torch.ones(2))], momentum=0.9)


def test_a_parameter_given_twice():
    params = named()
    with pytest.raises(ValueError, match="parameter 'a' is given twice"):
        SparseMaskedAdamW([("a", params["a"]), ("b", params["b"]), ("a", params["a"])])
    with pytest.raises(ValueError, match="parameter number 1 of group 0 is given twice"):
        SparseMaskedAdamW([params["a"], params["a"]])
    with pytest.raises(ValueError, match="parameter number 0 of group 1 is given twice"):
        SparseMaskedAdamW([{"params": [params["a"]]}, {"params": [params["a"]]}])
    opt = SparseMaskedAdamW([params["a"]])
    with pytest.raises(ValueError, match="given twice"):
        opt.add_param_group({"params": params["a"]})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_parameters_that_are_no_numbers_to_step(dtype):
    wrong = nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)
    with pytest.raises(TypeError, match="parameter 'w' is torch"):
        SparseMaskedAdamW([("w", wrong)])


def wrong_masks(params):
    mask = RowMask([1], SHAPE)
    return [
        ({"a": RowMask([1], (4, 9))}, ValueError, r"parameter 'a' has shape \(4, 8\), but its mask is for \(4, 9\)"),
        ({params["b"]: ColumnMask([1], (8, 4))}, ValueError, r"parameter 'b' has shape \(4, 8\)"),
        ({"a": mask, "z": mask}, ValueError, "no parameter is named 'z'; the first names are a, b, c"),
        ({nn.Parameter(torch.ones(SHAPE)): mask}, ValueError, "a key is not a parameter of this optimizer"),
        (
            {"a": mask, "b": torch.ones(SHAPE, dtype=torch.bool)},
            TypeError,
            "parameter 'b': expected a Mask, got Tensor",
        ),
        ({"a": mask, params["a"]: mask}, ValueError, "parameter 'a' is given twice, by name and by itself"),
        ([("a", mask)], TypeError, "expected {parameter or name: Mask}, got list"),
        ({3: mask}, ValueError, "a key is not a parameter of this optimizer"),
    ]


@pytest.mark.parametrize("number", range(8))
def test_masks_that_fit_no_parameter(number):
    params = named()
    masks, error, message = wrong_masks(params)[number]
    with pytest.raises(error, match=message):
        SparseMaskedAdamW(params.items(), masks=masks)
    good = {"a": RowMask([0, 1], SHAPE)}
    opt = SparseMaskedAdamW(params.items(), masks=good)
    fill_grads(params)
    opt.step()
    before = snapshot(opt)
    with pytest.raises(error, match=message):
        opt.set_masks(masks)
    assert opt.masks == good
    assert unchanged(before, opt)


def test_masks_by_name_need_names():
    with pytest.raises(ValueError, match="named_parameters"):
        SparseMaskedAdamW([nn.Parameter(torch.ones(SHAPE))], masks={"a": RowMask([1], SHAPE)})


def test_an_unknown_carry():
    params = named()
    opt = SparseMaskedAdamW(params.items())
    with pytest.raises(ValueError, match="carry: expected 'intersection' or 'none', got 'union'"):
        opt.set_masks({"a": RowMask([1], SHAPE)}, carry="union")
    assert opt.masks == {}


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_a_norm_that_is_not_above_zero(max_norm):
    params = named()
    fill_grads(params)
    with pytest.raises(ValueError, match="max_norm: expected a number above 0"):
        SparseMaskedAdamW(params.values()).clip_grad_norm_(max_norm)
    assert all((p.grad == 1).all() for p in params.values())


def wrong_shape(param):
    param.grad = torch.ones(SHAPE)
    param.grad.resize_(4, 4)


def wrong_dtype(param):
    param.grad = None
    param.grad_dtype = torch.float64
    param.grad = torch.ones(SHAPE, dtype=torch.float64)


def sparse(param):
    param.grad = torch.eye(4, 8).to_sparse()


def smaller(param):
    param.grad = None
    param.data = torch.ones(3, 8)
    param.grad = torch.ones(3, 8)


def wider(param):
    param.grad = None
    param.data = torch.ones(SHAPE, dtype=torch.float64)
    param.grad = torch.ones(SHAPE, dtype=torch.float64)


@pytest.mark.parametrize(
    "break_it, error, message",
    [
        (wrong_shape, ValueError, r"parameter 'c': its gradient has shape \(4, 4\), expected \(4, 8\)"),
        (wrong_dtype, ValueError, "parameter 'c': its gradient is torch.float64, expected torch.float32"),
        (sparse, RuntimeError, "parameter 'c': SparseMaskedAdamW takes dense gradients"),
        (smaller, ValueError, r"parameter 'c': its state was made for shape \(4, 8\)"),
        (wider, ValueError, "parameter 'c': its state was made for .* torch.float32 moments"),
    ],
)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mask", [None, RowMask([3], SHAPE), ElementMask(torch.eye(4, 8, dtype=torch.bool))])
def test_gradients_that_do_not_fit(implementation, mask, groups, break_it, error, message):
    params = named()
    items = list(params.items())
    given = items if groups == 1 else [{"params": [item]} for item in items]
    opt = SparseMaskedAdamW(given, masks={"c": mask} if mask else None)
    fill_grads(params)
    opt.step()
    break_it(params["c"])
    before = snapshot(opt)
    for _ in range(2):
        with pytest.raises(error, match=message):
            opt.step()
        assert unchanged(before, opt)


def test_a_sparse_gradient_at_the_first_step_allocates_nothing():
    params = named()
    opt = SparseMaskedAdamW([{"params": [item]} for item in params.items()])
    fill_grads(params)
    sparse(params["c"])
    with pytest.raises(RuntimeError, match="parameter 'c'"):
        opt.step()
    assert not opt.state


def test_an_error_leaves_the_optimizer_usable():
    params = named()
    opt = SparseMaskedAdamW(params.items(), masks={"a": RowMask([1], SHAPE)})
    fill_grads(params)
    wrong_shape(params["b"])
    with pytest.raises(ValueError, match="parameter 'b'"):
        opt.step()
    fill_grads(params)
    opt.step()
    assert {s["step"].item() for s in opt.state.values()} == {1}
