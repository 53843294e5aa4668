"""How many of each token's neurons can be dropped before the loss rises."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_cl.models.losses import Loss, answer_loss
from sparse_cl.models.parts import find_mlps
from sparse_cl.models.passes import Batch, evaluation

from .resampling import GROUPS, reflected_interval, resamples
from .result import Result

_RESAMPLES = 200


@dataclass(frozen=True)
class CriticalSparsity(Result):
    """The largest share of each token's neurons that can be dropped for a rise of the loss of `increase`.

    Attributes:
        share: that share; the loss was measured there, and at most `tolerance` above it, where it is too high.
        interval: 95 %, batches resampled; None with a single batch.
        increase: as given.
        base: the loss without dropping, in nats per token.
        curve: every share that was measured and its loss, by share.
        tokens: how many tokens the loss is the mean of.
    """

    share: float
    interval: tuple[float, float] | None
    increase: float
    base: float
    curve: tuple[tuple[float, float], ...]
    tokens: int


@torch.no_grad()
def critical_sparsity(
    model: nn.Module,
    batches: Iterable[Batch],
    increase: float = 0.01,
    *,
    modules: Sequence[nn.Module] | None = None,
    loss: Loss | None = None,
    tolerance: float = 0.01,
    groups: int = GROUPS,
    seed: int = 0,
) -> CriticalSparsity:
    """Bisects for the share of neurons with the smallest |activation|, of each token on its own and the same in every
    MLP at once, that can be set to zero with a rise of the mean answer loss of at most `increase`.

    One pass over the batches for each share that is tried, 1 + log2(1 / tolerance) in all. The loss need not rise
    steadily with the share: what is returned is where bisection ends, and the curve shows the rest.

    Args:
        batches: gone through afresh for each share.
        increase: of the loss, relative to that without dropping.
        modules: whose inputs are neurons; default the layers out of the MLPs' neurons.
        loss: default the answer loss (`losses.answer_loss`).
        tolerance: of the share.
        groups: batches are dealt to so many, in turn, which are resampled for the interval.

    Raises:
        ValueError: an argument out of range, batches that can be gone through only once, or no token that counts.
    """
    if not increase > 0:
        raise ValueError(f"increase: expected a rise above 0, got {increase}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance: expected a share in (0, 1), got {tolerance}")
    if iter(batches) is batches:
        raise ValueError(
            "batches: expected something that can be gone through again and again, as a list; got an iterator"
        )
    outs = [mlp.out for mlp in find_mlps(model)] if modules is None else list(modules)
    by_group: dict[float, Tensor] = {}
    means: dict[float, float] = {}

    def measure(share: float) -> float:
        with _dropping(outs, share), evaluation(model):
            by_group[share] = _group_losses(model, batches, loss or answer_loss, groups)
        total, tokens = by_group[share].sum(1)
        if not tokens:
            raise ValueError("batches: expected at least one with a token that counts, got none; is the domain empty?")
        means[share] = float(total / tokens)
        return means[share]

    base = measure(0.0)
    low, high = 0.0, 1.0
    while high - low > tolerance:
        middle = (low + high) / 2
        if measure(middle) <= base * (1 + increase):
            low = middle
        else:
            high = middle
    shares = sorted(means)
    interval = _interval(shares, torch.stack([by_group[share] for share in shares]), increase, seed)
    curve = tuple((share, means[share]) for share in shares)
    return CriticalSparsity(low, interval, increase, base, curve, int(by_group[0.0][1].sum()))


@contextmanager
def _dropping(outs: Sequence[nn.Module], share: float) -> Iterator[None]:
    """While it lasts, the smallest `share` of each row of the modules' inputs is zero."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        activation = inputs[0]
        count = int(share * activation.shape[-1])
        if not count:
            return inputs
        magnitude = activation.abs()
        largest_dropped = magnitude.kthvalue(count, dim=-1, keepdim=True).values
        return (torch.where(magnitude > largest_dropped, activation, 0), *inputs[1:])

    with ExitStack() as stack:
        for out in outs:
            stack.callback(out.register_forward_pre_hook(hook).remove)
        yield


def _group_losses(model: nn.Module, batches: Iterable[Batch], loss: Loss, groups: int) -> Tensor:
    """Summed losses, and numbers of tokens, by group of batches: (2, groups) float64."""
    sums = torch.zeros(2, groups, dtype=torch.float64)
    for number, batch in enumerate(batches):
        total, count = loss(model, batch)
        sums[:, number % groups] += torch.tensor([float(total), count], dtype=torch.float64)
    return sums


def _interval(shares: Sequence[float], sums: Tensor, increase: float, seed: int) -> tuple[float, float] | None:
    """Where the resampled curves, linear between the measured shares, cross the allowed rise.

    sums: (shares, 2, groups), losses and numbers of tokens.
    """
    sums = sums[:, :, sums[0, 1] > 0]
    groups = sums.shape[2]
    if groups < 2:
        return None
    drawn = resamples(groups, _RESAMPLES, torch.Generator().manual_seed(seed))
    # The first row is what was measured, which the others are compared with.
    totals = torch.cat([torch.ones_like(drawn[:1]), drawn]) @ sums.mT  # (shares, 1 + draws, 2)
    curves = (totals[..., 0] / totals[..., 1]).mT
    at = torch.tensor(shares, dtype=torch.float64)
    crossed = torch.tensor([_crossing(at, curve / curve[0] - 1, increase) for curve in curves], dtype=torch.float64)
    low, high = reflected_interval(crossed[0], crossed[1:]).tolist()
    return low, high


def _crossing(shares: Tensor, rises: Tensor, increase: float) -> float:
    over = (rises > increase).nonzero().flatten()
    if not len(over):
        return float(shares[-1])
    after = int(over[0])
    step = (increase - rises[after - 1]) / (rises[after] - rises[after - 1])
    return float(shares[after - 1] + step * (shares[after] - shares[after - 1]))
