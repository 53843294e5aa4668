"""What each method asks of a model: which parameters move, the optimizer's state, and the products of one token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_cl.layout import StateLayout
from sparse_cl.masks import Mask
from sparse_cl.methods import METHODS
from sparse_cl.optim.state import layout_for
from sparse_cl.probes.neuron_masks import neuron_count, neuron_masks, places
from sparse_cl.probes.parts import find_mlps
from sparse_cl.subspace.layers import find_layers

from .shapes import Matrix, ModelShape

#: Bytes of a float32 number. Adapters of PEFT, moments and masters of our optimizers are kept in it.
WIDE = 4


@dataclass(frozen=True)
class Demand:
    """One method on one model. FLOPs are of matrix products, 2 for a multiplication and an addition.

    Attributes:
        settings: the method's.
        weight_bytes: of all weights, adapters included.
        gradient_bytes: of the gradients that autograd keeps. A masked parameter's is dense.
        state_bytes: of the optimizer's state, as its `state_bytes()` counts it, in the domain where it is largest.
        step_bytes: read and written by one step of the optimizer.
        temporary_bytes: of what a step holds beside its state.
        forward, input_gradients, weight_gradients: FLOPs a token, attention's own products left out.
        attention_backward: share of the blocks through whose attention gradients pass.
        trained_attention, trained_mlp: whether gradients of these parts' weights are wanted, so that their inputs are
            kept.
        trained_norms: whether those of norms are.
        adapters: rank of the adapters; 0 without.
        projected: updates (rows, width) that each step projects out of a basis.
        tracked: (rows, width) of the layers of which a memory of subspaces is kept.
        shardable: whether its state can be spread over devices: a memory of subspaces cannot.
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
    attention_backward: float = 1.0
    trained_attention: bool = True
    trained_mlp: bool = True
    trained_norms: bool = True
    adapters: int = 0
    projected: tuple[tuple[int, int], ...] = ()
    tracked: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    shardable: bool = True
    remark: str = ""


def demand(method: str, shape: ModelShape, **options: Any) -> Demand:
    """What a method of `sparse_cl.methods.METHODS` asks for.

    Args:
        options: of the method's constructor.

    Raises:
        ValueError: no such method, an option that it refuses, or a model that it cannot train.
    """
    if method not in _DEMANDS:
        raise ValueError(f"unknown method {method!r}: expected {', '.join(_DEMANDS)}")
    made = METHODS[method](**options)
    made.check(shape.model)
    return _DEMANDS[method](shape, made.settings())


def _section_bytes(layout: StateLayout) -> int:
    # As the optimizer counts: what its tensors hold, without what aligns them in their buffer.
    return sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in layout.sections().values())


def _states(parameters: Iterable[tuple[Tensor, Mask | None]]) -> tuple[int, int]:
    """State bytes of our optimizers for these parameters, and how many entries move."""
    layouts = [
        layout_for(parameter, mask, master=parameter.dtype in (torch.bfloat16, torch.float16))
        for parameter, mask in parameters
    ]
    return sum(map(_section_bytes, layouts)), sum(layout.entries for layout in layouts)


def _torch_adamw_state(sizes: Iterable[int], itemsize: int) -> int:
    # Two moments in the parameter's dtype, and a float32 count.
    return sum(2 * size * itemsize + WIDE for size in sizes)


def _traffic(entries: int, itemsize: int, master: bool) -> int:
    """Bytes of one AdamW step: gradient read; two float32 moments, and the weight or its master, read and written."""
    return entries * (itemsize + 4 * WIDE + 2 * WIDE + (itemsize if master else 0))


def _first_inputs(shape: ModelShape) -> tuple[Matrix, ...]:
    """Layers whose inputs depend on nothing that is trained where embeddings and norms are not."""
    return shape.blocks[0].attention_into


def _adamw(shape: ModelShape, settings: dict[str, Any]) -> Demand:
    e, products = shape.itemsize, 2 * shape.multiplied
    held = shape.parameters * e
    return Demand(
        settings,
        weight_bytes=held,
        gradient_bytes=held,
        state_bytes=_torch_adamw_state((p.numel() for p in shape.model.parameters()), e),
        step_bytes=7 * held,
        # torch's multi-tensor step has the square roots of all second moments at a time.
        temporary_bytes=held,
        forward=products,
        input_gradients=products,
        weight_gradients=products,
        remark=""
        if e == WIDE
        else "torch.optim.AdamW on bfloat16 weights keeps bfloat16 moments and no master copy: small updates are lost "
        "to rounding. --precision mixed keeps float32 weights",
    )


def _adapted(shape: ModelShape) -> list[Matrix]:
    return [matrix for matrix in shape.matrices if matrix.name != shape.head]


def _adapters(shape: ModelShape, settings: dict[str, Any]) -> dict[str, Any]:
    """What all adapters have in common: A (rank, inputs) and B (outputs, rank) beside every layer but the head."""
    rank = settings["rank"]
    adapted = _adapted(shape)
    entries = sum(rank * (matrix.inputs + matrix.outputs) for matrix in adapted)
    unreached = sum(matrix.size + rank * matrix.inputs for matrix in _first_inputs(shape))
    products = 2 * (shape.multiplied + entries)
    return {
        "settings": settings,
        "weight_bytes": shape.parameters * shape.itemsize + entries * WIDE,
        "gradient_bytes": entries * WIDE,
        "forward": products,
        "input_gradients": products - 2 * unreached,
        "weight_gradients": 2 * entries,
        "trained_norms": False,
        "adapters": rank,
    }


def _lora(shape: ModelShape, settings: dict[str, Any]) -> Demand:
    common = _adapters(shape, settings)
    rank, held = settings["rank"], common["gradient_bytes"]
    sizes = (rank * size for matrix in _adapted(shape) for size in (matrix.inputs, matrix.outputs))
    return Demand(**common, state_bytes=_torch_adamw_state(sizes, WIDE), step_bytes=7 * held, temporary_bytes=held)


def _sparse_masked(shape: ModelShape, settings: dict[str, Any]) -> Demand:
    parameters = dict(shape.model.named_parameters())
    masks: dict[str, Mask] = {}
    for mlp in find_mlps(shape.model):
        masks |= neuron_masks(places(mlp), torch.arange(neuron_count(settings["fraction"], mlp.neurons)))
    state, entries = _states((parameters[name], mask) for name, mask in masks.items())
    e = shape.itemsize
    trained = sum(parameters[name].numel() for name in masks)
    first = shape.blocks[0]
    # Below the first MLP nothing is trained, so nothing is differentiated.
    unreached = sum(matrix.size for matrix in (*first.attention_into, first.attention_out, *first.mlp_into))
    weights = sum(matrix.size for block in shape.blocks for matrix in (*block.mlp_into, block.mlp_out))
    return Demand(
        settings,
        weight_bytes=shape.parameters * e,
        gradient_bytes=trained * e,
        state_bytes=state,
        step_bytes=_traffic(entries, e, e < WIDE),
        temporary_bytes=0,
        forward=2 * shape.multiplied,
        input_gradients=2 * (shape.multiplied - unreached),
        weight_gradients=2 * weights,
        attention_backward=1 - 1 / len(shape.blocks),
        trained_attention=False,
        trained_norms=False,
        remark="gradients of the MLPs are dense, of which the active neurons' are used; a weight gradient of those "
        f"alone would save {1 - entries / trained:.0%} of 2 · {weights / 1e9:.3g} G FLOPs a token",
    )


def _tracked(shape: ModelShape) -> tuple[tuple[int, int], ...]:
    layers, _ = find_layers(shape.model)
    return tuple(layer.shape for layer in layers.values())


def _orthogonal(shape: ModelShape, settings: dict[str, Any]) -> Demand:
    e, products = shape.itemsize, 2 * shape.multiplied
    tracked = _tracked(shape)
    state, entries = _states((parameter, None) for parameter in shape.model.parameters())
    # Beside the step: the old weights copied, subtracted, two passes of the projection, added.
    projecting = 11 * WIDE * sum(rows * width for rows, width in tracked)
    return Demand(
        settings,
        weight_bytes=shape.parameters * e,
        gradient_bytes=shape.parameters * e,
        state_bytes=state,
        step_bytes=_traffic(entries, e, e < WIDE) + projecting,
        temporary_bytes=WIDE * max(rows * width for rows, width in tracked),
        forward=products,
        input_gradients=products,
        weight_gradients=products,
        projected=tracked,
        tracked=tracked,
        shardable=False,
    )


def _orthogonal_lora(shape: ModelShape, settings: dict[str, Any]) -> Demand:
    common = _adapters(shape, settings)
    rank, entries = settings["rank"], common["gradient_bytes"] // WIDE
    adapted = _adapted(shape)
    # A dense state is two moments and an int32 count; float32 adapters need no master.
    return Demand(
        **common,
        state_bytes=2 * WIDE * entries + 4 * 2 * len(adapted),
        step_bytes=_traffic(entries, WIDE, master=False) + 11 * WIDE * sum(rank * m.inputs for m in adapted),
        temporary_bytes=WIDE * rank * max(matrix.inputs for matrix in adapted),
        projected=tuple((rank, matrix.inputs) for matrix in adapted),
        tracked=_tracked(shape),
        shardable=False,
    )


_DEMANDS: dict[str, Callable[[ModelShape, dict[str, Any]], Demand]] = {
    "adamw": _adamw,
    "lora": _lora,
    "sparse-masked": _sparse_masked,
    "orthogonal": _orthogonal,
    "orthogonal-lora": _orthogonal_lora,
}
"""By the names of `METHODS`."""
