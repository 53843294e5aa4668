"""The parameters of two checkpoints of one model, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

Weights = nn.Module | Mapping[str, Tensor]
"""A model, or its weights by name, as `state_dict` gives them."""


def paired_weights(before: Weights, after: Weights) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, weight before and weight after (on the device of the weight before), of every parameter in order.

    Raises:
        ValueError: a name that only one has, or two shapes; the first is named.
    """
    old, new = _weights(before, after), _weights(after, before)
    for name in [*old, *new]:
        if name not in old or name not in new:
            holder = "before" if name in old else "after"
            raise ValueError(
                f"the two checkpoints differ in structure: {name} is only in the one {holder}; compare checkpoints of "
                "one model, with adapters merged (merge_and_unload)"
            )
        if old[name].shape != new[name].shape:
            raise ValueError(
                f"the two checkpoints differ in structure: {name} is {tuple(old[name].shape)} before and "
                f"{tuple(new[name].shape)} after; compare checkpoints of one model"
            )
    for name, weight in old.items():
        yield name, weight, new[name].to(weight.device)


def paired_matrices(
    before: Weights, after: Weights, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Those of `paired_weights` that are matrices; with `names`, these and no others.

    Raises:
        ValueError: as `paired_weights`; a name of `names` that is no matrix of the checkpoints; no matrix at all.
    """
    pairs = {name: (old, new) for name, old, new in paired_weights(before, after) if old.dim() == 2}
    chosen = list(pairs) if names is None else list(names)
    for name in chosen:
        if name not in pairs:
            raise ValueError(f"names: {name!r} is no matrix of the checkpoints; there are {', '.join(pairs) or 'none'}")
    if not chosen:
        raise ValueError("before: expected at least one matrix to compare, got none")
    for name in chosen:
        yield name, *pairs[name]


def _weights(source: Weights, other: Weights) -> dict[str, Tensor]:
    """The parameters by name; of a mapping without what a model beside it calls a buffer, or by another name too."""
    if isinstance(source, nn.Module):
        return {name: weight.detach() for name, weight in source.named_parameters()}
    besides: set[str] = set()
    if isinstance(other, nn.Module):
        every = [*other.named_parameters(remove_duplicate=False), *other.named_buffers()]
        besides = {name for name, _ in every} - {name for name, _ in other.named_parameters()}
    return {name: weight.detach() for name, weight in source.items() if name not in besides}
