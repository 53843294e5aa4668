"""How large overlaps of random sets are: exact laws, for the nulls beside what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_DRAWS = 20_000


def hypergeometric(width: int, first: int, second: int) -> Tensor:
    """P(x neurons are in both) for random sets of `first` and `second` of `width` neurons: (min + 1,) float64."""
    # scipy.stats takes longer to import than all probes.
    from scipy.stats import hypergeom

    return torch.from_numpy(hypergeom.pmf(range(min(first, second) + 1), width, first, second))


def common_to_all(width: int, size: int, sets: int) -> Tensor:
    """P(x neurons are in every one of several random sets of one size): (size + 1,) float64."""
    law = torch.zeros(size + 1, dtype=torch.float64)
    law[size] = 1.0
    for _ in range(sets - 1):
        after = torch.zeros_like(law)
        for common in law.nonzero().flatten().tolist():
            step = hypergeometric(width, common, size)
            after[: len(step)] += law[common] * step
        # What is less likely than rounding is left out, so that wide layers stay quick.
        law = torch.where(after > 1e-14, after, 0.0)
    return law


def central_interval(law: Tensor, level: float = 0.95) -> tuple[int, int]:
    """The central interval of a law on 0, 1, ...: at most (1 - level)/2 of it lies below, and as much above."""
    tail = (1 - level) / 2
    below, above = law.cumsum(0), law.flip(0).cumsum(0).flip(0)
    low = int((below <= tail).sum())
    high = len(law) - 1 - int((above <= tail).sum())
    return low, high


def iou_of(common: Any, size: int) -> Any:
    """|A ∩ B| / |A ∪ B| of two sets of one size that have so many neurons in common: a Tensor for a Tensor."""
    return common / (2 * size - common)


def iou_interval(width: int, size: int) -> tuple[float, float]:
    """95 % of two random sets of `size` of `width` neurons have an IoU within it, by the hypergeometric law."""
    low, high = central_interval(hypergeometric(width, size, size))
    return iou_of(low, size), iou_of(high, size)


def mean_iou_interval(layers: Sequence[tuple[int, int]], generator: torch.Generator) -> tuple[float, float]:
    """95 % interval of the mean over layers of the IoU of two random sets, for each layer's (width, size).

    Exact for one layer. For several it is simulated from the exact laws of the layers, 20,000 draws: the IoU is no
    lattice variable that could be convolved, and at a few neurons a layer its mean is far from normal.
    """
    if len(layers) == 1:
        return iou_interval(*layers[0])
    total = torch.zeros(_DRAWS, dtype=torch.float64)
    laws: dict[tuple[int, int], Tensor] = {}
    for width, size in layers:
        key = (width, size)
        if key not in laws:
            laws[key] = hypergeometric(width, size, size).cumsum(0)
        uniform = torch.rand(_DRAWS, generator=generator, dtype=torch.float64)
        drawn = torch.searchsorted(laws[key], uniform).clamp(max=size)
        total += iou_of(drawn.double(), size)
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(total / len(layers), tails).tolist()
    return low, high
