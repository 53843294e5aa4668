"""Random masks, made on the device where they are used."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_cl import ColumnMask, ElementMask, RowMask, TwoFourMask
from sparse_cl.masks import Mask


def mask_for(kind: str, shape: tuple[int, ...], density: float, device: torch.device | str) -> Mask | None:
    """A random mask; None for a dense parameter.

    Args:
        kind: "dense", "rows", "columns", "elements", "band" (the first rows, as an element mask) or "two-four". Vectors
            get an empty mask under "columns" and "two-four".
    """

    def chosen(size: int) -> Tensor:
        return torch.randperm(size, device=device)[: round(density * size)]

    if kind == "dense":
        return None
    if kind == "rows":
        return RowMask(chosen(shape[0]), shape)
    if kind == "elements":
        return ElementMask(torch.rand(shape, device=device) < density)
    if kind == "band":
        dense = torch.zeros(shape, dtype=torch.bool, device=device)
        dense[: round(density * shape[0])] = True
        return ElementMask(dense)
    if len(shape) != 2:
        return RowMask(torch.empty(0, dtype=torch.int64, device=device), shape)
    if kind == "columns":
        return ColumnMask(chosen(shape[1]), shape)
    pair = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]])
    choice = torch.randint(6, (shape[0], shape[1] // 4), device=device)
    return TwoFourMask(pair.bool().to(device)[choice].view(shape))
