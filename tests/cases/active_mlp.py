"""A small MLP with active layers, and its batches."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparse_cl import ColumnMask, RowMask
from sparse_cl.nn import activate

ROWS = RowMask([2, 29, 11, 3], (32, 20))


COLUMNS = ColumnMask([0, 31, 5], (20, 32))


MASKS = {"0.weight": ROWS, "2.weight": COLUMNS}


def mlp(dtype=torch.float32):
    """Two layers around a nonlinearity that writes in place, as after an nn.Linear it may."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.LeakyReLU(inplace=True), nn.Linear(32, 20)).to(dtype)


def active_mlp(dtype=torch.float32, masks=None, **options):
    model = mlp(dtype)
    activate(model, masks or MASKS, **options)
    return model


def losses(model, inputs, autocast=None, checkpointing=None, factor=1.0):
    """Accumulates the gradients of several batches."""
    for x in inputs:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            y = model(x) if checkpointing is None else checkpoint(model, x, use_reentrant=checkpointing)
            (y.float().square().mean() * factor).backward()


def batches(dtype=torch.float32, count=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 7, 20, generator=generator).to(dtype).requires_grad_() for _ in range(count)]
