"""How much of what a domain lost in a layer lies where the next domain learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_cl.subspace.moments import ExactMoment

from .checks import check_shares
from .inputs import InputMoments
from .result import Result


@dataclass(frozen=True)
class SharedForgetting(Result):
    """Of one layer, where the change of its outputs on old inputs comes from.

    With P the projector on the directions that the new domain uses: x = Px + (1-P)x, and ΔW x is the sum of two parts.

    Attributes:
        moved: E‖ΔW x‖² over the old domain's tokens, over E‖W x‖² where the old weight was given; else E‖ΔW x‖².
        shared: E‖ΔW P x‖² / (E‖ΔW P x‖² + E‖ΔW (1-P) x‖²): the share that comes through directions that the new
            domain uses; NaN where nothing moved.
        null: E‖P x‖² / E‖x‖²: what `shared` is, on average, of a change in random directions of the input.
        rank: directions that the new domain uses.
    """

    moved: float
    shared: float
    null: float
    rank: int


def shared_forgetting(
    old: InputMoments,
    new: InputMoments,
    changes: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | None = None,
    *,
    energy: float = 0.95,
) -> dict[str, SharedForgetting]:
    """`SharedForgetting` of each layer, by name.

    Args:
        old: inputs of the domain that may be forgotten, before the new one was learned.
        new: inputs of the new domain.
        changes: layer → ΔW (outputs, inputs), over the new domain.
        weights: layer → W before it.
        energy: the directions that the new domain uses are the fewest that hold this share of its inputs' energy.

    Raises:
        ValueError: a share outside (0, 1]; a layer that was not probed, or of another width.
    """
    check_shares(energy=energy)
    reads = {layer: name for name, layers in old.layers.items() for layer in layers}
    found = {}
    for layer, change in changes.items():
        if layer not in reads or reads[layer] not in new.halves:
            raise ValueError(f"changes: {layer!r} was not probed; there are {', '.join(reads)}")
        a, b = (_moment(moments.halves[reads[layer]]) for moments in (old, new))
        if change.dim() != 2 or change.shape[1] != len(a):
            raise ValueError(f"changes: {layer!r} has shape {tuple(change.shape)}, expected (outputs, {len(a)})")
        delta = change.detach().to("cpu", torch.float64)
        scale = 1.0
        if weights is not None:
            held = weights[layer].detach().to("cpu", torch.float64)
            scale = float(((held @ a) * held).sum())
        found[layer] = _shared(delta, a, b, energy, scale)
    return found


def _moment(halves: tuple[ExactMoment, ExactMoment]) -> Tensor:
    """E[x xᵀ], (n, n) float64."""
    count = sum(float(half.count) for half in halves)
    return sum((half.moment.to("cpu", torch.float64) for half in halves), torch.tensor(0.0)) / max(count, 1.0)


def _shared(delta: Tensor, old: Tensor, new: Tensor, energy: float, scale: float) -> SharedForgetting:
    values, vectors = torch.linalg.eigh(new)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    rank = min(len(values), int((values.cumsum(0) < energy * values.sum() * (1 - 1e-12)).sum()) + 1)
    basis = vectors[:, :rank]
    along = delta @ basis
    across = delta - along @ basis.mT
    seen = basis.mT @ old @ basis
    inside, outside = float(((along @ seen) * along).sum()), float(((across @ old) * across).sum())
    moved = float(((delta @ old) * delta).sum())
    total = inside + outside
    return SharedForgetting(
        moved=moved / scale if scale else float("nan"),
        shared=inside / total if total else float("nan"),
        null=float(seen.trace() / old.trace()) if float(old.trace()) else float("nan"),
        rank=rank,
    )
