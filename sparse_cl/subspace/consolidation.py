"""The end of a domain: from what was observed to the directions that are remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_cl.reference.precision import full_precision

from .layers import Layer
from .moments import Moment
from .settings import Settings
from .subspace import Subspace, trusted
from .tables import Table

#: Numbers that one batch holds, so that consolidating takes a part of the memory that the model has.
_BATCH = 1 << 26

#: Directions with less than this share of the energy are rounding errors of float32 sums.
_NOISE = 1e-7


def batches(layers: Iterable[Layer]) -> Iterator[list[Layer]]:
    """Observed layers whose moments are of one kind, width and place: all that a batch needs."""
    groups: dict[tuple, list[Layer]] = {}
    for layer in layers:
        columns = layer.observed().columns
        size = max(1, _BATCH // (layer.width * columns))
        groups.setdefault((type(layer.moment), layer.width, columns, layer.place(), size), []).append(layer)
    for key, group in groups.items():
        for start in range(0, len(group), key[-1]):
            yield group[start : start + key[-1]]


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def agree(layers: Mapping[str, Layer], tables: Mapping[str, Table], moment: Callable[[Layer], Moment]) -> None:
    """Makes processes, if there are several, speak of all that any of them saw: they are about to add it up.

    Args:
        moment: gives a layer that this process saw nothing of an empty one.

    Raises:
        ValueError: layers read one tensor in one process, and several in another.
    """
    if not _is_distributed():
        return
    seen = {name: layer.source for name, layer in layers.items() if layer.moment is not None or layer.source}
    counted = {name: table.opaque for name, table in tables.items() if table.opaque or table.counts is not None}
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (seen, counted))
    for name, layer in layers.items():
        sources = {process[name] for process, _ in found if name in process}
        if len(sources) > 1:
            raise ValueError(
                f"consolidate: {name} reads the inputs of {', '.join(map(str, sources))} in some processes and not in "
                "others, so that they cannot be added up; build the memory with share_inputs=False"
            )
        if sources:
            (layer.source,) = sources
            if layer.source is None:
                moment(layer)
    for name, table in tables.items():
        said = [process[name] for _, process in found if name in process]
        table.opaque = any(said)
        if table.opaque:
            table.counts = None
        elif said and table.counts is None:
            device = "cpu" if table.param is None else table.param.device
            table.counts = torch.zeros(table.height, dtype=torch.float64, device=device)


def consolidate(
    layers: Sequence[Layer], tables: Sequence[Table], settings: Settings, weight: float, fade: float
) -> dict[str, int]:
    """Adds what observed layers and tables used to what is remembered of them, and forgets their moments.

    Args:
        weight: of the domain, whose inputs' mean energy along each direction is what counts.
        fade: what becomes of the weight of all earlier domains.

    Returns:
        How many directions each layer has more than before, by its name.
    """
    if settings.source == "inputs" and _is_distributed():
        # Each process has seen other inputs. Gradients are the same in all of them.
        for moment in {id(layer.moment): layer.observed() for layer in layers}.values():
            for tensor in moment.tensors().values():
                dist.all_reduce(tensor)
        for table in tables:
            if table.counts is not None:
                dist.all_reduce(table.counts)
    # Layers that read the same inputs, and always did, have one subspace.
    groups: dict[tuple, list[Layer]] = {}
    for layer in layers:
        groups.setdefault((id(layer.moment), id(layer.used()), layer.weight), []).append(layer)
    grown: dict[str, tuple[Subspace, float]] = {}
    alike = {found[0].name: found for found in groups.values()}
    for batch in batches(found[0] for found in groups.values()):
        subspaces = leading(
            [layer.observed() for layer in batch],
            [layer.faded(fade) for layer in batch],
            weight,
            [fade * layer.weight + weight for layer in batch],
            settings,
        )
        for first, subspace in zip(batch, subspaces, strict=True):
            for layer in alike[first.name]:
                grown[layer.name] = subspace, fade * layer.weight + weight
    # Only now, so that a factorization that fails leaves the domain open.
    added = {}
    for layer in layers:
        before = layer.rank
        (layer.subspace, layer.weight), layer.moment = grown[layer.name], None
        added[layer.name] = layer.rank - before
    for table in tables:
        table.end_domain(weight, fade)
    return added


def leading(
    moments: Sequence[Moment],
    known: Sequence[Subspace | None],
    weight: float,
    weights: Sequence[float],
    settings: Settings,
) -> list[Subspace]:
    """The leading directions of A = U diag(λ) Uᵀ + w E[x xᵀ], for each layer of a batch.

    As few as leave out no more than (1 - energy) w E‖x‖², what GPM (Saha, Garg & Roy 2021, equation 9) lets a domain
    leave out. With a cap on their number they are A's own, whatever U was. Without one U stays among them, as in GPM:
    no later domain makes an earlier one's directions free. What is left out is remembered as one number.

    Args:
        moments: of one kind, width and place.
        known: U and λ of earlier domains, faded.
        weight: w, of the domain.
        weights: Σ w over all domains, this one included.
    """
    device, dtype = moments[0].place
    with full_precision(device):
        counts = torch.stack([moment.count for moment in moments]).clamp(min=1)
        scales = (weight / counts).tolist()
        new = [float(moment.energy() * scale) for moment, scale in zip(moments, scales, strict=True)]
        if settings.max_rank is None:
            parts = zip(moments, scales, known, new, strict=True)
            found = [_grown(moment, scale, subspace, e, settings.energy) for moment, scale, subspace, e in parts]
        else:
            found = _largest(moments, scales, known, new, settings)
    result = []
    for (values, basis), e, subspace, whole in zip(found, new, known, weights, strict=True):
        total = e + (0.0 if subspace is None else subspace.total)
        outside = max(0.0, total - float(values.sum()))
        # In one order, as a file holds it: products of a transposed matrix round differently.
        basis = basis.to(dtype).clone(memory_format=torch.contiguous_format)
        mean = total / (len(basis) * whole)
        result.append(trusted(basis, values.to(dtype, copy=True), outside, mean))
    return result


def _grown(moment: Any, scale: float, subspace: Subspace | None, energy: float, share: float) -> tuple[Tensor, Tensor]:
    """λ and U of the span of the old directions and the fewest new ones that explain the share of an exact moment."""
    whole = moment.moment.double() * scale
    old = whole.new_zeros(len(whole), 0) if subspace is None else subspace.basis.double()
    outside = whole - old @ (old.mT @ whole)
    outside = outside - (outside @ old) @ old.mT
    values, vectors = torch.linalg.eigh((outside + outside.mT) / 2)
    missing = float(outside.diagonal().sum()) - (1 - share) * energy
    count = fewest(values.flip(0).tolist(), missing, _NOISE * energy, len(whole) - old.shape[1])
    # The last of the new ones may be as small as rounding errors, and then lie anywhere.
    basis = torch.linalg.qr(torch.cat([old, vectors[:, len(whole) - count :].flip(1)], 1)).Q
    inner = basis.mT @ whole @ basis
    if subspace is not None:
        inner.diagonal()[: subspace.rank] += subspace.values.double()
    values, turn = torch.linalg.eigh(inner)
    return values.flip(0).clamp(min=0), basis @ turn.flip(1)


def _largest(
    moments: Sequence[Moment],
    scales: Sequence[float],
    known: Sequence[Subspace | None],
    new: Sequence[float],
    settings: Settings,
) -> list[tuple[Tensor, Tensor]]:
    """λ and U of the largest eigenvalues of A."""
    kind: Any = type(moments[0])
    spectra = kind.spectra(moments, scales, known)
    inside = [0.0 if s is None else s.total - s.outside for s in known]
    ranks = [
        fewest(values, settings.energy * e + i, _NOISE * (e + i), settings.most(spectra.width))
        for values, e, i in zip(spectra.values.tolist(), new, inside, strict=True)
    ]
    columns = spectra.leading(max(ranks))
    return [(spectra.values[i, :rank], columns[i, :, :rank]) for i, rank in enumerate(ranks)]


def fewest(values: Sequence[float], wanted: float, noise: float, most: int) -> int:
    """How many of ``values`` (descending) it takes to sum to ``wanted``, without those below ``noise``."""
    count, found = 0, 0.0
    while count < min(most, len(values)) and found < wanted and values[count] > noise:
        found += values[count]
        count += 1
    return count
