"""What methods ask for that train ordinary weights, all of them or whole blocks."""

from __future__ import annotations

from typing import Any

from sparse_cl.methods import METHODS
from sparse_cl.subspace.layers import find_layers

from .demand import WIDE, Demand, Projected, projecting, states, torch_adamw_state, traffic
from .shapes import Matrix, ModelShape


def adamw(shape: ModelShape, settings: dict[str, Any], **changes: Any) -> Demand:
    e, products = shape.itemsize, 2 * shape.multiplied
    held = shape.parameters * e
    asked = {
        "weight_bytes": held,
        "gradient_bytes": held,
        "state_bytes": torch_adamw_state((p.numel() for p in shape.model.parameters()), e),
        "step_bytes": 7 * held,
        # torch's multi-tensor step has the square roots of all second moments at a time.
        "temporary_bytes": held,
        "forward": products,
        "input_gradients": products,
        "weight_gradients": products,
        "remark": ""
        if e == WIDE
        else "torch.optim.AdamW on bfloat16 weights keeps bfloat16 moments and no master copy: small updates are lost "
        "to rounding. --precision mixed keeps float32 weights",
    }
    return Demand(settings, **{**asked, **changes})


def ewc(shape: ModelShape, settings: dict[str, Any]) -> Demand:
    # Fisher information in float32 and the last weights; their difference from the present ones is in the graph of the
    # penalty.
    return adamw(
        shape,
        settings,
        forward_bytes=shape.parameters * shape.itemsize,
        kept_bytes=shape.parameters * (WIDE + shape.itemsize),
        observed_bytes=shape.parameters * (WIDE + shape.itemsize),
    )


def migu(shape: ModelShape, settings: dict[str, Any]) -> Demand:
    outputs = sum(matrix.outputs for matrix in block_matrices(shape))
    return adamw(shape, settings, kept_bytes=WIDE * outputs)


def mofo(shape: ModelShape, settings: dict[str, Any]) -> Demand:
    plain = adamw(shape, settings)
    # Its moments are float32 whatever the weights are. A step makes for one weight at a time the gradient in float32,
    # the root, the update, |m| and the copy in which the largest are looked for.
    largest = max(p.numel() for p in shape.model.parameters())
    return adamw(
        shape,
        settings,
        state_bytes=2 * WIDE * shape.parameters,
        step_bytes=plain.step_bytes + 8 * WIDE * shape.parameters,
        temporary_bytes=5 * WIDE * largest,
        remark="",
    )


def freeze_lower(shape: ModelShape, settings: dict[str, Any]) -> Demand:
    frozen = {id(p) for module in METHODS["freeze-lower"](**settings).frozen(shape.model) for p in module.parameters()}
    trained = [p for p in shape.model.parameters() if id(p) not in frozen]
    lowest = int(settings["frozen_share"] * len(shape.blocks))
    below = sum(matrix.size for matrix in block_matrices(shape)[: _layers_of(shape, lowest)])
    head = next(matrix for matrix in shape.matrices if matrix.name == shape.head)
    frozen_head = id(shape.model.get_output_embeddings().weight) in frozen
    held = sum(p.numel() for p in trained) * shape.itemsize
    return adamw(
        shape,
        settings,
        gradient_bytes=held,
        state_bytes=torch_adamw_state((p.numel() for p in trained), shape.itemsize),
        step_bytes=7 * held,
        temporary_bytes=held,
        input_gradients=2 * (shape.multiplied - below),
        weight_gradients=2 * (shape.multiplied - below - frozen_head * head.size),
        attention_backward=1 - lowest / len(shape.blocks),
        frozen_blocks=lowest,
    )


def dense(shape: ModelShape, settings: dict[str, Any], **changes: Any) -> Demand:
    """What our optimizers ask for without a mask, as in the first domain of methods that protect."""
    e = shape.itemsize
    state, entries = states((parameter, None, False) for parameter in shape.model.parameters())
    asked = {"state_bytes": state, "step_bytes": traffic(entries, e, e < WIDE), "temporary_bytes": 0, "remark": ""}
    return adamw(shape, settings, **{**asked, **changes})


def tracked(shape: ModelShape) -> tuple[tuple[int, int], ...]:
    layers, _ = find_layers(shape.model)
    return tuple(layer.shape for layer in layers.values())


def orthogonal(shape: ModelShape, settings: dict[str, Any]) -> Demand:
    layers = tracked(shape)
    sizes = [rows * width for rows, width in layers]
    return dense(
        shape,
        settings,
        step_bytes=dense(shape, settings).step_bytes + projecting(sizes),
        temporary_bytes=WIDE * max(sizes),
        projected=tuple(Projected(rows, width, width) for rows, width in layers),
        tracked=layers,
        shardable=False,
    )


def elastic(shape: ModelShape, settings: dict[str, Any]) -> Demand:
    """Weight, gradient and update of each layer are turned by the eigenbasis of its inputs, which layers share."""
    head = next(matrix for matrix in shape.matrices if matrix.name == shape.head)
    pulled, widest = [*block_matrices(shape), head], settings["max_width"]
    turned = [matrix for matrix in pulled if matrix.inputs <= widest]
    tied = shape.model.get_output_embeddings().weight is shape.model.get_input_embeddings().weight
    anchors = sum(matrix.size for matrix in pulled) + (not tied) * shape.model.get_input_embeddings().weight.numel()
    return dense(
        shape,
        settings,
        step_bytes=dense(shape, settings).step_bytes + projecting(matrix.size for matrix in turned),
        # The old weight, the turned one, the turned gradient, and the way from the anchor with what is taken back.
        temporary_bytes=5 * WIDE * max(matrix.size for matrix in pulled),
        turning_flops=3 * 2 * sum(matrix.size * matrix.inputs for matrix in turned),
        kept_bytes=WIDE * (input_bases(shape, widest) + anchors),
        observed_bytes=2 * WIDE * input_bases(shape, widest),
        shardable=False,
    )


def input_bases(shape: ModelShape, widest: int) -> int:
    """Entries of an eigenbasis of each distinct input of a linear layer, the head's too, that is no wider."""
    head = next(matrix for matrix in shape.matrices if matrix.name == shape.head)
    inputs = [matrices[0] for block in shape.blocks for matrices in (block.attention_into, block.mlp_into)]
    inputs += [matrix for block in shape.blocks for matrix in (block.attention_out, block.mlp_out)]
    return sum(matrix.inputs**2 for matrix in (*inputs, head) if matrix.inputs <= widest)


def curvature(shape: ModelShape, settings: dict[str, Any]) -> Demand:
    """Both eigenbases of each layer. How many of their vectors a step needs depends on the data: all are assumed."""
    layers = block_matrices(shape)
    bases = sum(matrix.outputs**2 + matrix.inputs**2 for matrix in layers)
    products = sum(matrix.size * (matrix.outputs + matrix.inputs) for matrix in layers)
    largest = max(matrix.size for matrix in layers)
    if settings["rest"] == "damp":
        own = {f"{matrix.name}.weight" for matrix in layers}
        rest = [parameter for name, parameter in shape.model.named_parameters() if name not in own]
        # The rows of a matrix have a diagonal, and what is no matrix has one column.
        widths = [parameter.shape[1] if parameter.dim() == 2 else 1 for parameter in rest]
        bases += sum(width**2 for width in widths)
        products += sum(parameter.numel() * width for parameter, width in zip(rest, widths, strict=True))
        largest = max(largest, *(parameter.numel() for parameter in rest))
    return dense(
        shape,
        settings,
        step_bytes=dense(shape, settings).step_bytes + projecting(matrix.size for matrix in layers),
        # The old weight, and the coordinates with their protection.
        temporary_bytes=3 * WIDE * largest,
        turning_flops=2 * 2 * products,
        kept_bytes=WIDE * bases,
        observed_bytes=2 * WIDE * bases,
        shardable=False,
        remark="projections as if every eigenvector were needed; with a threshold it is those with curvature above it",
    )


def block_matrices(shape: ModelShape) -> list[Matrix]:
    """The linear layers of the blocks, the lowest block's first."""
    return [
        matrix
        for block in shape.blocks
        for matrix in (*block.attention_into, block.attention_out, *block.mlp_into, block.mlp_out)
    ]


def _layers_of(shape: ModelShape, blocks: int) -> int:
    """How many of `block_matrices` belong to so many blocks."""
    return sum(len(block.attention_into) + len(block.mlp_into) + 2 for block in shape.blocks[:blocks])
