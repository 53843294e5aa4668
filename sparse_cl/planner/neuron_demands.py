"""What methods ask for that train the weights of some neurons."""

from __future__ import annotations

from typing import Any

import torch

from sparse_cl.layout import state_dtype
from sparse_cl.masks import Mask
from sparse_cl.methods.neurons import can_be_active
from sparse_cl.models.neuron_masks import neuron_count, neuron_masks, places
from sparse_cl.models.parts import find_mlps

from .demand import WIDE, Demand, Projected, projecting, states, traffic, unreached_by_masks
from .dense_demands import tracked
from .shapes import ModelShape


def sparse_masked(shape: ModelShape, settings: dict[str, Any], **changes: Any) -> Demand:
    model, e = shape.model, shape.itemsize
    masks, active = _masks(shape, settings)
    parameters = dict(model.named_parameters())
    state, _ = states((parameters[name], mask, name in active) for name, mask in masks.items())
    leaves = sum(masks[name].numel for name in active)
    leaf = state_dtype(next(model.parameters()).dtype).itemsize
    whole = {name: parameters[name] for name in masks if name not in active}
    dense = sum(parameter.numel() for parameter in whole.values())
    moved = sum(masks[name].numel for name in whole)
    kept = [name for block in shape.blocks if (name := f"{block.mlp_out.name}.weight") in active]
    asked = {
        "weight_bytes": shape.parameters * e,
        "gradient_bytes": leaves * leaf + dense * e,
        "state_bytes": state,
        "step_bytes": traffic(leaves, leaf, False) + leaves * e + traffic(moved, e, e < WIDE),
        "temporary_bytes": 0,
        "forward": 2 * shape.multiplied,
        "input_gradients": 2 * (shape.multiplied - unreached_by_masks(shape)),
        "weight_gradients": 2 * (leaves + sum(p.numel() for p in whole.values() if p.dim() == 2)),
        "attention_backward": 1 - 1 / len(shape.blocks),
        "trained_attention": False,
        "trained_norms": False,
        "neurons_kept": sum(masks[name].numel for name in kept) / sum(parameters[name].numel() for name in kept)
        if kept
        else 1.0,
    }
    if whole:
        asked["remark"] = (
            f"{len(whole)} weights and biases of neurons get whole gradients, of which the active neurons' are used: "
            "their layers are transposed or have a bias"
        )
    return Demand(settings, **{**asked, **changes})


def orthogonal_masked(shape: ModelShape, settings: dict[str, Any]) -> Demand:
    masks, _ = _masks(shape, settings)
    plain = sparse_masked(shape, settings)
    projected = []
    for block in shape.blocks:
        count = neuron_count(settings["fraction"], block.neurons)
        projected += [Projected(count, matrix.inputs, matrix.inputs) for matrix in block.mlp_into]
        projected.append(Projected(block.mlp_out.outputs, count, block.mlp_out.inputs))
    sizes = [mask.numel for mask in masks.values()]
    return sparse_masked(
        shape,
        settings,
        step_bytes=plain.step_bytes + projecting(sizes),
        temporary_bytes=WIDE * max(sizes),
        projected=tuple(projected),
        tracked=tracked(shape),
        shardable=False,
    )


def _masks(shape: ModelShape, settings: dict[str, Any]) -> tuple[dict[str, Mask], set[str]]:
    """Masks of as many neurons as a domain trains, and the names of those that are trained through active layers."""
    masks: dict[str, Mask] = {}
    for mlp in find_mlps(shape.model):
        masks |= neuron_masks(places(mlp), torch.arange(neuron_count(settings["fraction"], mlp.neurons)))
    return masks, {name for name in masks if can_be_active(shape.model, name, masks)}
