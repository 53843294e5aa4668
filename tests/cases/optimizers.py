"""Masks, models and loops that tests of optimizers share."""

import torch
from torch import nn

from sparse_cl import ColumnMask, ElementMask, RowMask, SparseMaskedAdamW, TwoFourMask

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def random_mask(kind, shape, density, rng):
    """A mask of any kind, or None for ``kind`` "dense"."""

    def some(size):
        return (torch.rand(size, generator=rng) < density).nonzero().view(-1)

    if kind == "dense":
        return None
    if kind == "rows":
        return RowMask(some(shape[0]), shape)
    if kind == "columns":
        return ColumnMask(some(shape[1]), shape)
    if kind == "elements":
        return ElementMask(torch.rand(shape, generator=rng) < density)
    order = torch.rand(shape[0], shape[1] // 4, 4, generator=rng).argsort(2)
    return TwoFourMask((order < 2).view(shape))


def open_entries(mask, shape):
    return torch.ones(shape, dtype=torch.bool) if mask is None else mask.to_dense()


def as_bytes(t):
    return t.detach().contiguous().view(-1).view(torch.uint8)


def spread(opt, param, name):
    """A compact state tensor at the active entries of the parameter's shape; zero elsewhere."""
    mask = opt._store.masks.get(param)
    dense = torch.zeros(param.shape, dtype=opt.state[param][name].dtype)
    dense.view(-1)[open_entries(mask, param.shape).view(-1)] = opt.state[param][name].reshape(-1)
    return dense


SHAPE = (6, 8)


def one(mask=None, dtype=torch.float32, **options):
    """A parameter with a gradient, and its optimizer."""
    param = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype))
    param.grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)
    return param, SparseMaskedAdamW([param], masks={param: mask} if mask else None, **options)


def snapshot(opt):
    """Copies of all parameters and all state, as bytes."""
    params = [as_bytes(p).clone() for g in opt.param_groups for p in g["params"]]
    return params + [as_bytes(v).clone() for s in opt.state.values() for v in s.values()]


def unchanged(before, opt):
    after = snapshot(opt)
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8)).to(dtype)


def train(net, opt, steps, seed=0):
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(5, 8, generator=rng).to(next(net.parameters()).dtype)
        opt.zero_grad()
        (net(x) - x).float().square().mean().backward()
        opt.step()
