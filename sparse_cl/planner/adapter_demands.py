"""What methods ask for that train adapters beside frozen weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparse_cl.masks import ColumnMask, RowMask
from sparse_cl.methods.lora import RANK
from sparse_cl.models.neuron_masks import neuron_count

from .demand import WIDE, Demand, Projected, projecting, states, torch_adamw_state, traffic, unreached_by_masks
from .dense_demands import input_bases, tracked
from .shapes import Matrix, ModelShape


def lora(shape: ModelShape, settings: dict[str, Any], **changes: Any) -> Demand:
    rank, adapted = settings["rank"], _adapted(shape)
    common = _adapters(shape, settings, adapted)
    held = common["gradient_bytes"]
    sizes = (rank * size for matrix in adapted for size in (matrix.inputs, matrix.outputs))
    asked = {"state_bytes": torch_adamw_state(sizes, WIDE), "step_bytes": 7 * held, "temporary_bytes": held}
    return Demand(**{**common, **asked, **changes})


def o_lora(shape: ModelShape, settings: dict[str, Any]) -> Demand:
    inputs = sum(matrix.inputs for matrix in _adapted(shape))
    return lora(shape, settings, kept_bytes_a_domain=WIDE * settings["rank"] * inputs)


def elastic_lora(shape: ModelShape, settings: dict[str, Any]) -> Demand:
    rank, adapted = settings["rank"], _adapted(shape)
    bases = input_bases(shape, settings["max_width"])
    turned = (matrix.inputs for matrix in adapted if matrix.inputs <= settings["max_width"])
    return Demand(
        **_own_step(shape, settings, temporaries=5),
        turning_flops=3 * 2 * rank * sum(inputs**2 for inputs in turned),
        kept_bytes=WIDE * (bases + rank * sum(matrix.inputs for matrix in adapted)),
        observed_bytes=2 * WIDE * bases,
        shardable=False,
    )


def orthogonal_lora(shape: ModelShape, settings: dict[str, Any]) -> Demand:
    rank, adapted = settings["rank"], _adapted(shape)
    return Demand(
        **_own_step(shape, settings, temporaries=1),
        projected=tuple(Projected(rank, matrix.inputs, matrix.inputs) for matrix in adapted),
        tracked=tracked(shape),
        shardable=False,
    )


def sparse_masked_lora(shape: ModelShape, settings: dict[str, Any]) -> Demand:
    rank = settings["rank"]
    into = [matrix for block in shape.blocks for matrix in block.mlp_into]
    out = [block.mlp_out for block in shape.blocks]
    common = _adapters(shape, settings, [*into, *out])
    masked = []
    for block in shape.blocks:
        count = neuron_count(settings["fraction"], block.neurons)
        for matrix in block.mlp_into:
            copies = matrix.outputs // block.neurons
            b = (matrix.outputs, rank)
            masked += [((rank, matrix.inputs), None), (b, RowMask(torch.arange(copies * count), b))]
        a = (rank, block.mlp_out.inputs)
        masked += [(a, ColumnMask(torch.arange(count), a)), ((block.mlp_out.outputs, rank), None)]
    state, entries = states((torch.empty(size, device="meta"), mask, False) for size, mask in masked)
    first = shape.blocks[0]
    below = unreached_by_masks(shape) + rank * sum(matrix.inputs for matrix in first.mlp_into)
    return Demand(
        **{**common, "input_gradients": common["forward"] - 2 * below},
        state_bytes=state,
        step_bytes=traffic(entries, WIDE, master=False),
        temporary_bytes=0,
        attention_backward=1 - 1 / len(shape.blocks),
        trained_attention=False,
    )


def osf(shape: ModelShape, settings: dict[str, Any]) -> Demand:
    """Beside each frozen weight (m, n): U (m, r), S (r) and V (r, n), trained, and what they were at first."""
    adapted = _adapted(shape)
    high = {m.name: int(settings["effective_rank"] * min(m.outputs, m.inputs)) for m in adapted}
    low = {m.name: min(m.outputs, m.inputs) - high[m.name] for m in adapted}
    trained = sum(low[m.name] * (m.outputs + m.inputs + 1) for m in adapted)
    # The directions that stay are kept where they are not the complement of those that are trained.
    kept = trained + sum(high[m.name] * max(m.outputs, m.inputs) for m in adapted if m.outputs != m.inputs)
    products = 2 * (shape.multiplied + sum(2 * low[m.name] * (m.outputs + m.inputs) for m in adapted))
    first = shape.blocks[0].attention_into
    unreached = 2 * sum(m.size + 2 * low[m.name] * m.inputs for m in first)
    projections = 0
    for m in adapted:
        for side in (m.outputs, m.inputs):
            # A side that is the smaller one is projected onto what is trained, the other off what stays.
            basis = low[m.name] if side == min(m.outputs, m.inputs) else high[m.name]
            projections += 2 * 2 * side * basis * low[m.name]
    held = trained * WIDE
    sizes = (size for m in adapted for size in (low[m.name] * m.outputs, low[m.name], low[m.name] * m.inputs))
    return Demand(
        settings,
        weight_bytes=shape.parameters * shape.itemsize + held + kept * WIDE,
        gradient_bytes=held,
        state_bytes=torch_adamw_state(sizes, WIDE),
        step_bytes=7 * held,
        temporary_bytes=held,
        forward=products,
        input_gradients=products - unreached,
        # Those of the initial factors are made with the others', and dropped.
        weight_gradients=products - 2 * shape.multiplied,
        step_flops=projections,
        trained_norms=False,
        adapters={name: 2 * rank for name, rank in low.items()},
        wide_adapters=True,
        # Each forward pass joins the factors with their first values.
        forward_bytes=WIDE * sum(2 * low[m.name] * (m.outputs + m.inputs) for m in adapted),
        remark="it keeps the singular vectors that it trains twice, as they are and as they were",
    )


def _adapted(shape: ModelShape) -> list[Matrix]:
    return [matrix for matrix in shape.matrices if matrix.name != shape.head]


def _own_step(shape: ModelShape, settings: dict[str, Any], temporaries: int) -> dict[str, Any]:
    """Adapters that our optimizers step, with A projected.

    Args:
        temporaries: matrices of an A's size that a step holds.
    """
    rank, adapted = settings["rank"], _adapted(shape)
    common = _adapters(shape, settings, adapted)
    entries = common["gradient_bytes"] // WIDE
    return {
        **common,
        # A dense state is two moments and an int32 count; float32 adapters need no master.
        "state_bytes": 2 * WIDE * entries + 4 * 2 * len(adapted),
        "step_bytes": traffic(entries, WIDE, master=False) + projecting(rank * matrix.inputs for matrix in adapted),
        "temporary_bytes": temporaries * WIDE * rank * max(matrix.inputs for matrix in adapted),
    }


def _adapters(shape: ModelShape, settings: dict[str, Any], adapted: Sequence[Matrix]) -> dict[str, Any]:
    """What all of LoRA's have in common: A (rank, inputs) and B (outputs, rank) beside every layer of `adapted`."""
    rank = settings.get("rank", RANK)
    entries = sum(rank * (matrix.inputs + matrix.outputs) for matrix in adapted)
    # Inputs of the first layers depend on nothing that is trained.
    first = shape.blocks[0].attention_into
    unreached = sum(matrix.size + rank * matrix.inputs for matrix in first)
    products = 2 * (shape.multiplied + entries)
    return {
        "settings": settings,
        "weight_bytes": shape.parameters * shape.itemsize + entries * WIDE,
        "gradient_bytes": entries * WIDE,
        "forward": products,
        "input_gradients": products - 2 * unreached,
        "weight_gradients": 2 * entries,
        "trained_norms": False,
        "adapters": {matrix.name: rank for matrix in adapted},
        "wide_adapters": True,
    }
