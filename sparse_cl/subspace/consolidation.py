"""The end of a domain: from what was observed to the directions that join the bases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from sparse_cl.linalg import orthonormalize
from sparse_cl.reference.precision import full_precision

from .layers import Layer, Moment
from .moments import ExactMoment
from .subspace import Subspace, smaller_half

#: Numbers that one batch holds, so that consolidating takes a part of the memory that the model has.
_BATCH = 1 << 26

#: Directions with less than this share of the energy are rounding errors of float32 sums.
_NOISE = 1e-7


def batches(layers: Iterable[Layer]) -> Iterator[list[Layer]]:
    """Observed layers whose moments are of one kind, width and place: all that a batch needs."""
    groups: dict[tuple, list[Layer]] = {}
    for layer in layers:
        columns = layer.moment.columns
        size = max(1, _BATCH // (layer.width * columns))
        groups.setdefault((type(layer.moment), layer.width, columns, layer.place(), size), []).append(layer)
    for key, group in groups.items():
        for start in range(0, len(group), key[-1]):
            yield group[start : start + key[-1]]


def consolidate(layers: Sequence[Layer], energy: float, max_rank: int | None, sum_up: bool) -> dict[str, int]:
    """Adds what observed layers used to their bases, and forgets their moments.

    Args:
        energy, max_rank: as for :func:`new_directions`.
        sum_up: whether each process of a distributed run has observed something else. Gradients are the same in all
            of them; inputs are not, and bases must be.

    Returns:
        The number of directions added to each layer, by its name.
    """
    if sum_up and dist.is_available() and dist.is_initialized():
        for layer in layers:
            for tensor in layer.moment.tensors().values():
                dist.all_reduce(tensor)
    added, grown = {}, {}
    for batch in batches(layers):
        subspaces = [layer.used() for layer in batch]
        found = new_directions([layer.moment for layer in batch], subspaces, energy, max_rank)
        for layer, subspace, directions in zip(batch, subspaces, found, strict=True):
            added[layer.name] = directions.shape[1]
            grown[layer.name] = smaller_half(directions) if subspace is None else subspace.extended(directions)
    # Only now, so that a factorization that fails leaves the domain open.
    for layer in layers:
        layer.subspace, layer.moment = grown[layer.name], None
    return {layer.name: added[layer.name] for layer in layers}


def new_directions(
    moments: Sequence[Moment], subspaces: Sequence[Subspace | None], energy: float, max_rank: int | None
) -> list[Tensor]:
    """For each layer of a batch the fewest directions (n, k) that, with those in use, explain ``energy``.

    GPM's criterion (Saha, Garg & Roy 2021, equation 9): ‖R U Uᵀ‖² + ‖(R - R U Uᵀ)_k‖² ≥ ε ‖R‖². They are orthonormal
    and orthogonal to the used ones.
    """
    with full_precision(moments[0].place[0]):
        return _new_directions(moments, subspaces, energy, max_rank)


def directions_needed(moment: ExactMoment, subspace: Subspace | None, energy: float) -> int:
    """How many :func:`new_directions` would find, without finding them."""
    with full_precision(moment.place[0]):
        outside = moment.outside(subspace)
        values = torch.linalg.eigvalsh(outside).flip(0)
        total, left = float(moment.energy()), float(outside.diagonal().sum())
    return _fewest(values.tolist(), left - (1 - energy) * total, _NOISE * total, None)


def _new_directions(
    moments: Sequence[Moment], subspaces: Sequence[Subspace | None], energy: float, max_rank: int | None
) -> list[Tensor]:
    spectra = type(moments[0]).spectra(moments, subspaces)
    counts = [
        _fewest(values, outside - (1 - energy) * total, _NOISE * total, max_rank)
        for values, total, outside in zip(
            spectra.values.tolist(), spectra.totals.tolist(), spectra.outsides.tolist(), strict=True
        )
    ]
    most = max(counts)
    columns = spectra.leading(most)
    if not most:
        return list(columns)
    position = torch.arange(most, device=columns.device)
    columns = columns.masked_fill(position >= torch.tensor(counts, device=columns.device)[:, None, None], 0)
    # A complement is projected onto by itself; bases go in one batch, padded with zero columns.
    bases = []
    for i, subspace in enumerate(subspaces):
        bases.append(columns[i, :, :0])
        if subspace is not None and subspace.complement:
            columns[i] = subspace.project_out_(columns[i].mT.contiguous()).mT
        elif subspace is not None:
            bases[i] = subspace.matrix
    widest = max(basis.shape[1] for basis in bases)
    against = torch.stack([pad(basis, (0, widest - basis.shape[1])) for basis in bases]) if widest else None
    columns, ranks = orthonormalize(columns, against)
    return [column[:, :rank].clone() for column, rank in zip(columns, ranks.tolist(), strict=True)]


def _fewest(values: Sequence[float], missing: float, noise: float, max_rank: int | None) -> int:
    """How many of ``values`` (descending) it takes to sum to ``missing``."""
    count = 0
    limit = len(values) if max_rank is None else min(max_rank, len(values))
    while count < limit and missing > 0 and values[count] > noise:
        missing -= values[count]
        count += 1
    return count
