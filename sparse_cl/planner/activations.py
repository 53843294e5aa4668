"""Memory of what the forward pass keeps for the backward pass.

The structure is that of Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer Models, section
4), whose block of a GPT keeps s b h (34 + 5 a s / h) bytes. Here attention is fused, so that the term in s² is gone
and the log of each row's sum stays in its place; there is no dropout; norms are computed in float32; and an MLP may be
gated. What is kept was counted on Llama and applies to blocks like it; others keep a little more or less.
"""

from __future__ import annotations

import torch

from .demand import WIDE, Demand
from .shapes import BlockShape, ModelShape

PRECISIONS = ("bf16", "mixed", "fp32")
"""bf16: weights, products and activations in bfloat16. mixed: float32 weights, products in bfloat16 (autocast).
fp32: all in float32."""

FORMULA = (
    "bytes a token and block: norms 2·4·h, normalized 2·e·h (trained norms), inputs of trained layers 2·e·h, "
    "attention e·(2·q + 2·k) + 4·heads, MLP e·4·f (gated) or e·2·f; h width, q and k queries and keys, f neurons, "
    "e bytes of an activation; LoRA keeps a float32 copy of each adapted layer's input"
)


def weight_dtype(precision: str) -> torch.dtype:
    """What the weights are kept in while they are trained."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def block_bytes(block: BlockShape, demand: Demand, precision: str) -> int:
    """Bytes a token that one block keeps.

    Args:
        precision: one of `PRECISIONS`.
    """
    e = WIDE if precision == "fp32" else 2
    residual = e if precision == "bf16" else WIDE
    h, f, q = block.width, block.neurons, block.queries
    kept = 2 * (WIDE * h + WIDE)  # inputs of both norms, in float32, and what each row is divided by
    if demand.trained_norms:
        kept += 2 * residual * h
    kept += e * (2 * q + 2 * block.keys) + WIDE * block.heads
    # The activation function's input and, where there is a gate, what it multiplies with.
    kept += e * f * (3 if block.gated else 1)
    layers = (*block.attention_into, block.attention_out, *block.mlp_into, block.mlp_out)
    adapted = [layer for layer in layers if layer.name in demand.adapters]
    if adapted and demand.wide_adapters and precision == "bf16":
        # PEFT's LoRA is float32: every layer turns its input into a float32 copy of its own.
        kept += WIDE * sum(layer.inputs for layer in adapted)
    else:
        own_copies = precision == "mixed"  # autocast narrows an input anew for every layer that takes it
        if demand.trained_attention:
            kept += e * h * (len(block.attention_into) if own_copies else 1)
        if demand.trained_mlp:
            kept += e * h * (len(block.mlp_into) if own_copies else 1)
        kept += round(e * f * demand.neurons_kept)  # input of the layer out of the neurons
    inside = WIDE if precision == "fp32" or (precision == "bf16" and demand.wide_adapters) else 2
    return kept + inside * sum(demand.adapters[layer.name] for layer in adapted)


def activation_bytes(shape: ModelShape, demand: Demand, precision: str, tokens: int, checkpointing: bool) -> int:
    """Bytes that all blocks keep for `tokens` tokens.

    Args:
        checkpointing: of whole blocks: each keeps its input, and one at a time is computed again with all it keeps.
    """
    blocks = [block_bytes(block, demand, precision) for block in shape.blocks[demand.frozen_blocks :]]
    if not checkpointing:
        return tokens * sum(blocks)
    residual = 2 if precision == "bf16" else WIDE
    return tokens * (residual * sum(block.width for block in shape.blocks[demand.frozen_blocks :]) + max(blocks))


def logit_bytes(shape: ModelShape, precision: str, tokens: int) -> int:
    """Bytes around the loss: the logits, their float32 log-softmax, and two gradients of it while it is passed back."""
    logits = WIDE if precision == "fp32" else 2
    return tokens * shape.vocabulary * (logits + 3 * WIDE)
