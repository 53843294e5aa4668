"""The shape of a model without its weights: built from its configuration on the meta device."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from sparse_cl.models.parts import find_blocks, is_transposed, shape_of


@dataclass(frozen=True)
class Matrix:
    """A linear layer (outputs × inputs). `name`: the module's."""

    name: str
    outputs: int
    inputs: int

    @property
    def size(self) -> int:
        return self.outputs * self.inputs


@dataclass(frozen=True)
class BlockShape:
    """One residual block.

    Attributes:
        attention_into, attention_out, mlp_into, mlp_out: its linear layers.
        queries, keys: heads × size of a head, of the queries and of the keys (the values are as wide as the keys).
        heads: of the queries.
        neurons: of the MLP.
        gated: whether two products of the MLP's input make a neuron (GLU).
    """

    attention_into: tuple[Matrix, ...]
    attention_out: Matrix
    mlp_into: tuple[Matrix, ...]
    mlp_out: Matrix
    queries: int
    keys: int
    heads: int
    neurons: int
    gated: bool

    @property
    def width(self) -> int:
        return self.mlp_out.outputs


@dataclass(frozen=True)
class ModelShape:
    """A causal language model.

    Attributes:
        name: where its configuration came from.
        model: on the meta device, in the dtype that its weights are trained in.
        blocks: its residual blocks.
        matrices: every linear layer, the head too, which may be tied to the embedding.
        head: the name of the head among them.
        vocabulary: outputs of the head.
    """

    name: str
    model: nn.Module = field(repr=False)
    blocks: tuple[BlockShape, ...] = field(repr=False)
    matrices: tuple[Matrix, ...] = field(repr=False)
    head: str
    vocabulary: int

    @cached_property
    def parameters(self) -> int:
        """Distinct parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def multiplied(self) -> int:
        """Weights that every token is multiplied with: all linear layers, a tied head too, no other embedding."""
        return sum(matrix.size for matrix in self.matrices)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return next(self.model.parameters()).element_size()


def read_config(source: str) -> Any:
    """A `transformers` configuration.

    Args:
        source: a folder with a config.json, that file itself, or a name on the Hub.

    Raises:
        ValueError: there is none.
    """
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--model {source}: no configuration of a transformers model could be read ({reason}). Give a folder with "
            "a config.json, that file, or a name on the Hub"
        ) from error


def shape_of_config(config: Any, name: str, dtype: torch.dtype = torch.bfloat16) -> ModelShape:
    """The shape of the causal language model of a configuration; no weight is made or loaded.

    Raises:
        ValueError: it is no causal language model, a mixture of experts, or its blocks are not known here.
    """
    import transformers

    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise ValueError(
            f"--model {name}: a {type(config).__name__} is of no causal language model, and no other is planned for. "
            "Give one that AutoModelForCausalLM loads"
        ) from error
    try:
        found = find_blocks(model)
    except ValueError as error:
        raise ValueError(
            f"--model {name}: {str(error).partition('. ')[0]}. The planner takes dense models whose blocks it knows"
        ) from error
    head = model.get_output_embeddings()
    matrices, head_name = [], ""
    for layer_name, module in model.named_modules():
        if isinstance(module, nn.Linear) or is_transposed(module):
            matrices.append(Matrix(layer_name, *shape_of(module)))
            if module is head:
                head_name = layer_name
    if not head_name:
        raise ValueError(
            f"--model {name}: {type(model).__name__} has no output embedding (get_output_embeddings), so what its head "
            "costs is unknown. Give a causal language model of transformers"
        )
    return ModelShape(
        name,
        model,
        tuple(_block(block, config) for block in found),
        tuple(matrices),
        head_name,
        shape_of(head)[0],
    )


def _block(block: Any, config: Any) -> BlockShape:
    into, out = _matrices(block.attention)
    queries = out.inputs
    mlp_into, mlp_out = _matrices(block.mlp)
    outputs = sum(matrix.outputs for matrix in mlp_into)
    return BlockShape(
        into,
        out,
        mlp_into,
        mlp_out,
        queries,
        (sum(matrix.outputs for matrix in into) - queries) // 2,
        config.get_text_config().num_attention_heads,
        mlp_out.inputs,
        gated=outputs == 2 * mlp_out.inputs,
    )


def _matrices(part: Any) -> tuple[tuple[Matrix, ...], Matrix]:
    into = tuple(Matrix(name, *shape_of(layer)) for name, layer in part.into.items())
    return into, Matrix(part.out_name, *shape_of(part.out))
