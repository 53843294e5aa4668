"""What one method asks of a model, and the arithmetic that all methods share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_cl.layout import StateLayout
from sparse_cl.masks import Mask
from sparse_cl.optim.state import layout_for

from .shapes import ModelShape

#: Bytes of a float32 number. Adapters of PEFT, moments and masters of our optimizers are kept in it.
WIDE = 4


@dataclass(frozen=True)
class Projected:
    """An update (rows, width) that each step projects out of a basis of a layer's used input directions.

    Attributes:
        inputs: of the layer; the update may have fewer columns, those of a mask.
    """

    rows: int
    width: int
    inputs: int


@dataclass(frozen=True)
class Demand:
    """One method on one model. FLOPs are of matrix products, 2 for a multiplication and an addition.

    Attributes:
        settings: the method's.
        weight_bytes: of all weights, adapters included, and what OSF keeps of their first values.
        gradient_bytes: of the gradients that autograd keeps.
        state_bytes: of the optimizer's state, as its `state_bytes()` counts it, in the domain where it is largest. The
            leaves of active layers are counted here, as the masters that they are.
        step_bytes: read and written by one step of the optimizer.
        temporary_bytes: of what a step holds beside its state.
        forward, input_gradients, weight_gradients: FLOPs a token, attention's own products left out.
        step_flops: of a step, however many tokens it has, in every domain.
        turning_flops: of a step, in float32, from the second domain on: products with whole bases.
        attention_backward: share of the blocks through whose attention gradients pass.
        frozen_blocks: how many of the lowest blocks keep nothing, as no gradient passes.
        trained_attention, trained_mlp: whether gradients of these parts' weights are wanted, so that their inputs are
            kept.
        trained_norms: whether those of norms are.
        neurons_kept: share of the inputs of the layer out of the neurons that are kept.
        adapters: layer → numbers a token that are kept between the two factors of its adapter.
        wide_adapters: whether adapters are float32 whatever the model is, as PEFT's.
        forward_bytes: of what a forward pass keeps for the backward pass however many tokens there are.
        projected: updates that each step projects out of a basis.
        tracked: (rows, width) of the layers of which a memory of subspaces is kept.
        kept_bytes: of what the method itself keeps on the device from the second domain on, subspaces left out.
        kept_bytes_a_domain: the same, for each domain learned.
        observed_bytes: of what it sums over a domain's batches when the domain is learned, subspaces left out.
        shardable: whether its state can be spread over devices: bases of directions cannot.
        remark: what to know of it.
    """

    settings: dict[str, Any]
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int
    step_bytes: int
    temporary_bytes: int
    forward: int
    input_gradients: int
    weight_gradients: int
    step_flops: int = 0
    turning_flops: int = 0
    attention_backward: float = 1.0
    frozen_blocks: int = 0
    trained_attention: bool = True
    trained_mlp: bool = True
    trained_norms: bool = True
    neurons_kept: float = 1.0
    adapters: Mapping[str, int] = field(default_factory=dict, repr=False)
    wide_adapters: bool = False
    forward_bytes: int = 0
    projected: tuple[Projected, ...] = field(default=(), repr=False)
    tracked: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    kept_bytes: int = 0
    kept_bytes_a_domain: int = 0
    observed_bytes: int = 0
    shardable: bool = True
    remark: str = ""


def states(parameters: Iterable[tuple[Tensor, Mask | None, bool]]) -> tuple[int, int]:
    """State bytes of our optimizers, and how many entries move.

    Args:
        parameters: each with its mask, and whether it is trained through an active layer.
    """
    layouts = [
        layout_for(parameter, mask, master=active or parameter.dtype in (torch.bfloat16, torch.float16))
        for parameter, mask, active in parameters
    ]
    return sum(map(_section_bytes, layouts)), sum(layout.entries for layout in layouts)


def _section_bytes(layout: StateLayout) -> int:
    # As the optimizer counts: what its tensors hold, without what aligns them in their buffer.
    return sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in layout.sections().values())


def torch_adamw_state(sizes: Iterable[int], itemsize: int) -> int:
    """State bytes of `torch.optim.AdamW`: two moments in the parameter's dtype, and a float32 count."""
    return sum(2 * size * itemsize + WIDE for size in sizes)


def traffic(entries: int, itemsize: int, master: bool) -> int:
    """Bytes of one AdamW step: gradient read; two float32 moments, and the weight or its master, read and written."""
    return entries * (itemsize + 4 * WIDE + 2 * WIDE + (itemsize if master else 0))


def projecting(sizes: Iterable[int]) -> int:
    """Bytes beside the step: the old weights copied, subtracted, two passes of the projection, added."""
    return 11 * WIDE * sum(sizes)


def unreached_by_masks(shape: ModelShape) -> int:
    """Weights whose inputs need no gradient where neurons alone are trained: all below the first MLP's neurons."""
    first = shape.blocks[0]
    return sum(matrix.size for matrix in (*first.attention_into, first.attention_out, *first.mlp_into))
