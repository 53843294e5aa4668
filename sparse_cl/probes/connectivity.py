"""The loss on the straight line between two checkpoints: whether they lie in one flat basin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_cl.models.losses import predictions
from sparse_cl.models.passes import Batch, evaluation

from .checks import check_domains, check_read_again
from .pairing import paired_weights
from .result import Result


@dataclass(frozen=True)
class DomainPath(Result):
    """Loss of one domain along the line.

    Attributes:
        losses: mean over answer tokens of −ln p, in nats, at each t.
        tokens: answer tokens.
        barrier: largest loss above the straight line between the end losses, at least 0, which is the null: a line
            without a barrier (Frankle et al. 2020).
        barrier_at: t where it is; None without a barrier.
        barrier_halves: of the even and of the odd sequences alone, an interval; None with one sequence.
        rise: loss after minus loss before: what the domain forgot (or learned, below 0).
        rise_halves: as `barrier_halves`.
    """

    losses: tuple[float, ...]
    tokens: int
    barrier: float
    barrier_at: float | None
    barrier_halves: tuple[float, float] | None
    rise: float
    rise_halves: tuple[float, float] | None


@dataclass(frozen=True)
class Connectivity(Result):
    """Result of `connectivity`: `points`, the values of t from 0 (before) to 1 (after), and `domains` by name."""

    points: tuple[float, ...]
    domains: dict[str, DomainPath]


@torch.no_grad()
def connectivity(
    before: nn.Module, after: nn.Module, batches_by_domain: Mapping[str, Iterable[Batch]], points: int = 5
) -> Connectivity:
    """Answer loss of each domain at θ(t) = (1 − t)·before + t·after (linear mode connectivity, Frankle et al. 2020).

    Neither model is written to: the one before is run with other weights, which take the memory of one more model, and
    with its own buffers. A barrier narrower than the distance of two points can be missed.

    Args:
        before, after: checkpoints of one causal language model, with `logits` in their output.
        batches_by_domain: name → batches with input_ids, attention_mask and labels; iterated over once for each point,
            so a list rather than a generator.
        points: values of t, both ends among them; at least 2.

    Raises:
        ValueError: checkpoints of different structure; fewer than 2 points; no domain; a domain without an answer
            token, or whose batches can be read only once.
    """
    if points < 2:
        raise ValueError(f"points: expected at least 2, the two ends, got {points}")
    check_domains(1, batches_by_domain=batches_by_domain)
    check_read_again(batches_by_domain=batches_by_domain)
    pairs = list(paired_weights(before, after))
    line = tuple(i / (points - 1) for i in range(points))
    sums: dict[str, list[Tensor]] = {name: [] for name in batches_by_domain}
    for t in line:
        with evaluation(before), _weights_of(before, {name: _between(old, new, t) for name, old, new in pairs}):
            for domain, batches in batches_by_domain.items():
                sums[domain].append(_sums_by_half(before, batches, domain))
    return Connectivity(line, {name: _path(line, torch.stack(values)) for name, values in sums.items()})


def _between(old: Tensor, new: Tensor, t: float) -> Tensor:
    if t in (0, 1) or not old.is_floating_point():
        return old if t < 0.5 else new
    wide = torch.promote_types(old.dtype, torch.float32)
    return torch.lerp(old.to(wide), new.to(wide), t).to(old.dtype)


@contextmanager
def _weights_of(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model runs with other weights; its own are not written to, and are back afterwards."""
    own = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.data = weights[name]
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = own[name]


def _sums_by_half(model: nn.Module, batches: Iterable[Batch], domain: str) -> Tensor:
    """Sum of −ln p of the answer tokens, and their number, of even and of odd sequences: (2, 2) float64."""
    sums, first = torch.zeros(2, 2, dtype=torch.float64), 0
    for batch in batches:
        logits, targets, places = predictions(model, batch)
        if targets is None or places is None or not isinstance(batch, Mapping):
            raise ValueError(f"batches of {domain}: expected mappings with input_ids, got a batch of {type(batch)}")
        length = batch["input_ids"].shape[1]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        losses = nn.functional.cross_entropy(wide, targets, reduction="none").double()
        half = (first + places // length) % 2
        counted = torch.stack([losses, torch.ones_like(losses)], 1)
        sums += torch.stack([counted[half == which].sum(0) for which in (0, 1)]).cpu()
        first += len(batch["input_ids"])
    if not sums[:, 1].sum():
        raise ValueError(f"batches of {domain}: expected at least one answer token, got none; is the domain empty?")
    return sums


def _path(line: Sequence[float], sums: Tensor) -> DomainPath:
    """sums: (points, halves, 2)."""
    total = sums.sum(1)
    losses = total[:, 0] / total[:, 1]
    barrier, where = _barrier(line, losses)
    rise = (losses[-1] - losses[0]).item()
    barriers = rises = None
    if (sums[0, :, 1] > 0).all():
        even, odd = (sums[:, half, 0] / sums[:, half, 1] for half in (0, 1))
        barriers = (_barrier(line, even)[0], _barrier(line, odd)[0])
        rises = ((even[-1] - even[0]).item(), (odd[-1] - odd[0]).item())
    return DomainPath(tuple(losses.tolist()), int(total[0, 1]), barrier, where, barriers, rise, rises)


def _barrier(line: Sequence[float], losses: Tensor) -> tuple[float, float | None]:
    straight = torch.lerp(losses[0], losses[-1], torch.tensor(line, dtype=torch.float64))
    above = losses - straight
    # Both ends are on the straight line, rounding aside.
    above[0] = above[-1] = 0.0
    highest = int(above.argmax())
    return above[highest].item(), line[highest] if above[highest] > 0 else None
