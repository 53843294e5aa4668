"""Where the weights of neurons are, and the masks that free some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_cl.masks import ColumnMask, RowMask

from .parts import MLP, Linear, is_transposed, matrix_of


@dataclass(frozen=True)
class Place:
    """Slices of one parameter that belong to neurons.

    Attributes:
        parameter: its name in the model.
        shape: its shape.
        dim: neuron i has slice i along this dimension.
        copies: how many stacks of neurons lie along it: 2 where gate and up are one layer, and then neuron i has slice
            i + neurons too.
    """

    parameter: str
    shape: tuple[int, ...]
    dim: int
    copies: int = 1

    def mask(self, neurons: Tensor, gain: Tensor | None = None) -> RowMask | ColumnMask:
        """The mask that frees the slices of these neurons, distinct indices (k,), with a gain (k,) above 0 each."""
        width = self.shape[self.dim] // self.copies
        slices = torch.cat([neurons + copy * width for copy in range(self.copies)])
        gain = None if gain is None else gain.repeat(self.copies)
        return (ColumnMask if self.dim else RowMask)(slices, self.shape, gain)

    def energies(self, tensor: Tensor) -> Tensor:
        """Of a tensor of the parameter's shape, ‖slices‖² of each neuron: (neurons,) float64, on its device."""
        wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
        if wide.dim() > 1:
            wide = torch.linalg.vector_norm(wide, dim=[d for d in range(wide.dim()) if d != self.dim])
        return wide.double().square().view(self.copies, -1).sum(0)


def output_places(name: str, layer: Linear, copies: int = 1) -> tuple[Place, ...]:
    """Places of the neurons that a linear layer's outputs are: rows of its weight, entries of its bias.

    Raises:
        ValueError: the layer has no plain weight matrix (`parts.matrix_of`).
    """
    matrix_of(layer, name)
    weight = Place(f"{name}.weight", tuple(layer.weight.shape), int(is_transposed(layer)), copies)
    if layer.bias is None:
        return (weight,)
    return weight, Place(f"{name}.bias", tuple(layer.bias.shape), 0, copies)


def places(mlp: MLP) -> tuple[Place, ...]:
    """Places of an MLP's neurons: rows of the layers into them with their biases, columns of the layer out of them.

    The bias of the layer out belongs to no neuron. Errors as for `output_places`.
    """
    copies = 2 if mlp.layout.stacked else 1
    into = [place for name, layer in mlp.into.items() for place in output_places(name, layer, copies)]
    matrix_of(mlp.out, mlp.out_name)
    out = Place(f"{mlp.out_name}.weight", tuple(mlp.out.weight.shape), int(not is_transposed(mlp.out)))
    return (*into, out)


def neuron_masks(
    where: Sequence[Place], neurons: Tensor, gain: Tensor | None = None
) -> dict[str, RowMask | ColumnMask]:
    """Masks that free the given neurons, as `Place.mask`, at these places: parameter name → mask."""
    return {place.parameter: place.mask(neurons, gain) for place in where}


def neuron_count(fraction: float, width: int) -> int:
    """How many of `width` neurons a share of them is: rounded, at least one.

    Raises:
        ValueError: the share is outside (0, 1].
    """
    if not 0 < fraction <= 1:
        asked = f", which is {round(fraction * width)} of a layer's {width} neurons" if fraction > 1 else ""
        raise ValueError(f"fraction: expected a share of the neurons in (0, 1], got {fraction}{asked}")
    return min(width, max(1, round(fraction * width)))


def top_neurons(activation: Tensor, fraction: float) -> Tensor:
    """Sorted indices of the largest entries of a 1-D tensor: `neuron_count` of them."""
    return activation.topk(neuron_count(fraction, activation.numel())).indices.sort().values
