"""The guarantees of SparseMaskedAdamW: AdamW's own steps where a mask is open, not a bit elsewhere, state to match."""

import pytest
import torch
from cases.optimizers import DTYPES, as_bytes, open_entries, random_mask, spread
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import AdamW
from torch.testing._internal.common_optimizers import optim_db

from sparse_cl import ElementMask, RowMask, SparseMaskedAdamW

KINDS = ("rows", "columns", "elements", "two_four")
OF_ADAMW = next(info for info in optim_db if info.optim_cls is AdamW)
# The step that the fixture swaps is the same for all examples.
a_few = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def configurations():
    """All of optim_db's: those for CUDA too, which bring capturable, tensor learning rates and tensor betas."""
    inputs = [i for device in ("cpu", "cuda") for i in OF_ADAMW.optim_inputs_func(device=device)]
    return list({i.desc: i.kwargs for i in inputs}.items())


@pytest.mark.parametrize("desc, options", configurations(), ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "all-open"])
def test_100_steps_equal_those_of_adamw(implementation, desc, options, masked):
    torch.manual_seed(0)
    shapes = [(33, 20), (17,), (5, 4, 3), (), (0, 3), (1, 1)]
    theirs = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    mine = [nn.Parameter(p.detach().clone()) for p in theirs]
    masks = {}
    if masked:
        masks = {mine[i]: RowMask(range(shapes[i][0]), shapes[i]) for i in (0, 1)}
        masks[mine[2]] = ElementMask(torch.ones(5, 4, 3, dtype=torch.bool))
    # torch's own AdamW takes capturable on an accelerator only; the numbers are the same.
    expected = AdamW(theirs, **{**options, "capturable": False})
    opt = SparseMaskedAdamW(mine, **options, masks=masks)
    for _ in range(100):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        opt.step()
        expected.step()
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * (b.abs().max().item() if b.numel() else 0))
        if b.numel():
            for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if options.get("amsgrad") else [])):
                torch.testing.assert_close(
                    opt.state[a][name].view(-1), expected.state[b][name].view(-1), rtol=3e-6, atol=1e-7
                )


@pytest.mark.parametrize("refused", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"differentiable": True}])
def test_only_these_options_of_adamw_are_refused(refused):
    (name,) = refused
    with pytest.raises(ValueError, match=f"{name}=.* is not supported"):
        SparseMaskedAdamW([nn.Parameter(torch.ones(2))], **refused)
    SparseMaskedAdamW([nn.Parameter(torch.ones(2))], foreach=None, fused=None, differentiable=False)


def dense_adamw(start, grads, at, **options):
    """Values after each of ``at`` steps of torch's AdamW, run densely in ``start``'s dtype."""
    param = nn.Parameter(start.clone())
    opt, values = AdamW([param], foreach=False, **options), {}
    for t, grad in enumerate(grads, start=1):
        param.grad = grad.to(param.dtype)
        opt.step()
        if t in at:
            values[t] = param.detach().clone()
    return values


def composed(start, grads, first, second, **options):
    """Values after 25 and 50 dense steps, put together by which of the two masks an entry was in."""
    whole = dense_adamw(start, grads, (25, 50), **options)
    late = dense_adamw(start, grads[25:], (25,), **options)
    at_25 = torch.where(first, whole[25], start)
    at_50 = torch.where(second, torch.where(first, whole[50], late[25]), at_25)
    return at_25, at_50


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@a_few
@given(data=st.data())
def test_active_entries_move_as_in_dense_adamw_and_frozen_ones_not_a_bit(
    implementation, dtype, weight_decay, kind, data
):
    shape = data.draw(st.tuples(st.integers(0, 9), st.sampled_from((0, 4, 8, 36))), "shape")
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999), "seed"))
    densities = [data.draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)), "density") for _ in range(2)]
    masks = [random_mask(kind, shape, densities[0], rng)]
    masks.append(random_mask(data.draw(st.sampled_from((kind, *KINDS, "dense"))), shape, densities[1], rng))
    first, second = (open_entries(mask, shape) for mask in masks)

    # Entries that never open hold arbitrary bytes, and their gradients are no numbers at all.
    never = ~(first | second)
    start = torch.randn(shape, generator=rng).to(dtype)
    garbage = torch.randint(256, (*shape, dtype.itemsize), generator=rng, dtype=torch.uint8).view(dtype).view(shape)
    start = torch.where(never, garbage, start)
    grads = [torch.randn(shape, generator=rng).to(dtype).masked_fill(never, torch.nan) for _ in range(50)]

    param = nn.Parameter(start.clone())
    options = {"lr": 1e-2, "weight_decay": weight_decay}
    opt = SparseMaskedAdamW([param], masks={param: masks[0]}, **options)
    seen, masters = [], []
    for t, grad in enumerate(grads, start=1):
        param.grad = grad.clone()
        opt.step()
        if t in (25, 50):
            seen.append(param.detach().clone())
            masters.append(spread(opt, param, "master") if "master" in opt.state[param] else None)
        if t == 25:
            opt.set_masks({param: masks[1]} if masks[1] is not None else {})

    exact = composed(start.double(), grads, first, second, **options)
    single = composed(start.float(), grads, first, second, **options)
    for active, now, master, oracle, plain in zip((first, second), seen, masters, exact, single, strict=True):
        fixed = ~active if active is first else never
        assert torch.equal(as_bytes(now[fixed]), as_bytes(start[fixed]))
        if not active.any():
            assert not opt.state[param] or active is first
            continue
        value = now if dtype == torch.float32 else master
        error = (value.double() - oracle)[active].norm()
        allowed = 2 * (plain.double() - oracle)[active].norm() + 3e-7 * oracle[active].norm()
        assert error <= allowed
        if dtype != torch.float32:
            assert torch.equal(now[active], master[active].to(dtype))
    # What the change of masks froze stays as it was at step 25.
    left = first & ~second
    assert torch.equal(as_bytes(seen[1][left]), as_bytes(seen[0][left]))


@a_few
@given(data=st.data())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_frozen_bytes_stay_without_master_weights(implementation, dtype, data):
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999), "seed"))
    kind = data.draw(st.sampled_from(KINDS))
    mask = random_mask(kind, (7, 36), 0.4, rng)
    start = torch.randint(256, (7, 72), generator=rng, dtype=torch.uint8).view(dtype)
    start = torch.where(mask.to_dense(), torch.ones(()).to(dtype), start)
    param = nn.Parameter(start.clone())
    opt = SparseMaskedAdamW([param], weight_decay=0.1, lr=1e-2, masks={param: mask}, master_weights=False)
    for _ in range(10):
        param.grad = torch.randn(7, 36, generator=rng).to(dtype)
        opt.step()
    frozen = ~mask.to_dense()
    assert torch.equal(as_bytes(param[frozen]), as_bytes(start[frozen]))
    assert param[~frozen].isfinite().all()
    assert "master" not in opt.state[param]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_without_master_weights_small_updates_survive_on_average(implementation, dtype):
    # An update of 1e-5 is far below half the spacing at 1: rounding to nearest would lose every one.
    param = nn.Parameter(torch.ones(1 << 14, dtype=dtype))
    opt = SparseMaskedAdamW([param], lr=1e-5, weight_decay=0.0, master_weights=False)
    for _ in range(100):
        param.grad = torch.ones_like(param)
        opt.step()
    spacing = torch.finfo(dtype).eps
    assert abs(param.double().mean().item() - (1 - 100 * 1e-5)) < 5 * (100 * 1e-5 * spacing / param.numel()) ** 0.5


def test_parameters_round_apart_and_runs_repeat(implementation):
    def run():
        params = [nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2)]
        opt = SparseMaskedAdamW(params, master_weights=False)
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            opt.step()
        return params

    (a, b), again = run(), run()
    assert torch.equal(a, again[0])
    assert torch.equal(b, again[1])
    assert 0.1 < (a != b).double().mean() < 0.9


def stepped(dtype, masks_of, shape=(1000, 256), **options):
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for _ in range(3)]
    opt = SparseMaskedAdamW(params, masks={p: masks_of(shape) for p in params}, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    held = sum(packed.buffer.untyped_storage().nbytes() for packed in opt._store.packed.values())
    return opt, opt.state_bytes(), held, 3 * shape[0] * shape[1]


def rows_5_percent(shape):
    return RowMask(range(0, shape[0], 20), shape)


def test_state_of_a_row_mask_is_its_share_of_adamws():
    _, said, held, numel = stepped(torch.float32, rows_5_percent)
    dense = AdamW([p := nn.Parameter(torch.ones(numel))])
    p.grad = torch.ones(numel)
    dense.step()
    theirs = sum(t.nbytes for t in dense.state[p].values())
    assert said <= 0.052 * theirs
    assert held <= 0.052 * theirs
    assert abs(held - said) < 3 * 9 * 64


def test_state_of_bf16_with_master_weights():
    _, said, held, numel = stepped(torch.bfloat16, rows_5_percent)
    assert said <= 12.5 * 0.05 * numel
    assert held <= 12.5 * 0.05 * numel
    _, said, *_ = stepped(torch.bfloat16, rows_5_percent, master_weights=False)
    assert said <= 8.5 * 0.05 * numel


@pytest.mark.parametrize("density", [0.05, 0.5])
@pytest.mark.parametrize("kind, index_bytes", [("columns", 0.01), ("elements", 0.134), ("two_four", 0.13)])
def test_state_of_other_masks_is_their_entries_and_a_bit_an_entry_at_most(kind, index_bytes, density):
    """And of element masks 8 bytes for each 1024 entries."""
    rng = torch.Generator().manual_seed(0)
    opt, said, _, numel = stepped(torch.float32, lambda shape: random_mask(kind, shape, density, rng))
    active = sum(mask.numel for mask in opt.masks.values())
    assert 8 * active < said <= 8 * active + index_bytes * numel


def test_empty_masks_allocate_nothing():
    opt, said, held, _ = stepped(torch.float32, lambda shape: RowMask([], shape))
    assert said == held == 0
    assert not any(opt.state.values())


@given(size=st.integers(2, 80), cut=st.integers(1, 79), zeros=st.sampled_from((0.0, 0.3, 1.0)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_an_entry_do_not_depend_on_what_lies_beside_it(dtype, size, cut, zeros):
    """Vector code may round otherwise than scalar code, and take another way where a second moment is zero."""
    rng = torch.Generator().manual_seed(size)
    cut, start = min(cut, size - 1), torch.randn(size, generator=rng).to(dtype)
    gradients = torch.randn(3, size, generator=rng) * (torch.rand(3, size, generator=rng) >= zeros)
    whole, *parts = (torch.nn.Parameter(x.clone()) for x in (start, start[:cut], start[cut:]))
    for params, pieces in (((whole,), ((0, size),)), (parts, ((0, cut), (cut, size)))):
        optimizer = SparseMaskedAdamW(list(params), lr=1.0)  # so that the last bit of an update counts
        for gradient in gradients:
            for param, (begin, end) in zip(params, pieces, strict=True):
                param.grad = gradient[begin:end].to(dtype)
            optimizer.step()
    assert torch.equal(whole, torch.cat([part.detach() for part in parts]))
