"""The parts of a transformer that probes watch: residual blocks, and in each its attention and its MLP."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

Linear: TypeAlias = Any
"""A linear layer: `nn.Linear`, transformers' Conv1D, or an adapted or quantized one. They share no base class."""

_MIXTURE = re.compile("Experts|Router|M[oO][eE]")


@dataclass(frozen=True)
class Layout:
    """Names of linear layers, children of one module: into its neurons (or heads), and out of them.

    `stacked`: the one layer into the neurons holds gate and up on top of each other (2·neurons outputs).
    """

    into: tuple[str, ...]
    out: str
    stacked: bool = False


MLPS = (
    Layout(("gate_proj", "up_proj"), "down_proj"),  # Llama, Qwen, Mistral, Gemma
    Layout(("gate_up_proj",), "down_proj", stacked=True),  # Phi-3, GLM-4
    Layout(("fc1",), "fc2"),  # OPT, Phi
    Layout(("c_fc",), "c_proj"),  # GPT-2, GPT-Neo
    Layout(("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Bloom
)
ATTENTIONS = (
    Layout(("q_proj", "k_proj", "v_proj"), "o_proj"),  # Llama, Qwen, Mistral, Gemma
    Layout(("qkv_proj",), "o_proj"),  # Phi-3
    Layout(("q_proj", "k_proj", "v_proj"), "dense"),  # Phi
    Layout(("q_proj", "k_proj", "v_proj"), "out_proj"),  # OPT
    Layout(("c_attn",), "c_proj"),  # GPT-2
    Layout(("query_key_value",), "dense"),  # GPT-NeoX, Bloom
)
_ACTIVATIONS = ("act_fn", "activation_fn", "act")


@dataclass(frozen=True)
class Attention:
    """One attention of a model. `name` is the module's; `into` and `out` are its linear layers by full name."""

    name: str
    layout: Layout
    into: dict[str, Linear]
    out: Linear
    out_name: str


@dataclass(frozen=True)
class MLP(Attention):
    """One MLP of a model. `activation`: the module of its non-linearity, where it has one."""

    activation: nn.Module | None = None

    @property
    def neurons(self) -> int:
        """Number of neurons: inputs of the layer out of them."""
        return shape_of(self.out)[1]


@dataclass(frozen=True)
class Block:
    """One residual block; the output of `module` is the hidden state after it."""

    name: str
    module: nn.Module
    attention: Attention
    mlp: MLP


def is_transposed(layer: nn.Module) -> bool:
    """Whether the weight is (in, out): GPT-2's Conv1D. Recognised by name, as transformers is not imported here."""
    return type(layer).__name__ == "Conv1D"


def shape_of(layer: Linear) -> tuple[int, int]:
    """Outputs and inputs of a linear layer, adapted or quantized ones too."""
    if is_transposed(layer):
        return layer.weight.shape[1], layer.weight.shape[0]
    return layer.out_features, layer.in_features


def matrix_of(layer: Linear, name: str) -> Tensor:
    """The weight of a linear layer as (outputs, inputs), a view.

    Raises:
        ValueError: it has no plain matrix (a quantized or adapted layer).
    """
    if not hasattr(layer, "get_base_layer") and tuple(layer.weight.shape) == (
        shape_of(layer)[::-1] if is_transposed(layer) else shape_of(layer)
    ):
        return layer.weight.mT if is_transposed(layer) else layer.weight
    raise ValueError(
        f"{name} is a {type(layer).__name__} without a plain weight matrix; its neurons can be watched but not chosen. "
        "Load the model unquantized, and merge its adapters (merge_and_unload)"
    )


def find_mlps(model: nn.Module) -> list[MLP]:
    """Every MLP of the model with one of the layouts `MLPS`, in the order of its modules.

    Raises:
        ValueError: there is none, or one with parts that are not linear layers; or the model is a mixture of experts.
    """
    return [
        MLP(*found, next((children[a] for a in _ACTIVATIONS if a in children), None))
        for found, children in _find(model, "MLP", MLPS)
    ]


def find_attentions(model: nn.Module) -> list[Attention]:
    """Every attention of the model with one of the layouts `ATTENTIONS`; errors as for `find_mlps`."""
    return [Attention(*found) for found, _ in _find(model, "attention", ATTENTIONS)]


def find_blocks(model: nn.Module) -> list[Block]:
    """Every residual block: entries of a ModuleList that hold one attention and one MLP.

    Raises:
        ValueError: there is none; and as `find_mlps`.
    """
    mlps, attentions = find_mlps(model), find_attentions(model)
    blocks = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        for number, child in module.named_children():
            full = f"{name}.{number}" if name else number
            own_attentions = [part for part in attentions if f"{part.name}.".startswith(f"{full}.")]
            own_mlps = [part for part in mlps if f"{part.name}.".startswith(f"{full}.")]
            if len(own_attentions) == len(own_mlps) == 1:
                blocks.append(Block(full, child, own_attentions[0], own_mlps[0]))
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no residual blocks that are known here. Looked for entries of a "
            "torch.nn.ModuleList with one attention and one MLP each. Give the modules to watch: modules={name: module}"
        )
    return blocks


def spread(blocks: Sequence[Block], count: int) -> list[Block]:
    """At most `count` of the blocks, evenly spread, the first and the last among them."""
    if count < 1:
        raise ValueError(f"count: expected at least 1 block, got {count}")
    if count >= len(blocks):
        return list(blocks)
    if count == 1:
        return [blocks[len(blocks) // 2]]
    return [blocks[round(i * (len(blocks) - 1) / (count - 1))] for i in range(count)]


def linear_layers(model: nn.Module, blocks: Sequence[Block] | None = None) -> dict[str, Linear]:
    """The linear layers of the blocks (None: of all) by name: embeddings and head left out.

    Raises:
        ValueError: as `find_blocks`.
    """
    layers: dict[str, Linear] = {}
    for block in find_blocks(model) if blocks is None else blocks:
        for part in (block.attention, block.mlp):
            layers |= {**part.into, part.out_name: part.out}
    return layers


def refuse_mixtures(model: nn.Module, why: str) -> None:
    """Raises a ValueError that says why, if the model is a mixture of experts."""
    for name, module in model.named_modules():
        if _MIXTURE.search(type(module).__name__):
            raise ValueError(
                f"{type(model).__name__} is a mixture of experts ({name or 'the model'} is a {type(module).__name__}), "
                f"{why}"
            )


def refuse_shared(model: nn.Module) -> None:
    """Raises a ValueError that names two layers with one weight between them; a head tied to an embedding may be."""
    first: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding) or not isinstance(weight, nn.Parameter) or weight.dim() < 2:
            continue
        if (other := first.setdefault(id(weight), name)) != name:
            raise ValueError(
                f"{name} and {other} share one weight, while what is used of a layer is known of each alone; give each "
                "a copy, or take a method with a memory of inputs (elastic, orthogonal)"
            )


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT put adapters into the model. An attribute of the model would say so after they were merged too."""
    return any(hasattr(module, "get_base_layer") for module in model.modules())


def refuse_quantized(model: nn.Module, method: str, *, under_adapters: bool = True) -> None:
    """Raises a ValueError that names the first layer whose weight is no matrix of floating-point numbers.

    Args:
        under_adapters: also of a model that PEFT wrapped, whose base is frozen.
    """
    if has_adapters(model) and not under_adapters:
        return  # no optimizer steps integers
    for name, module in model.named_modules():
        for own, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            packed = own in ("qweight", "weight_packed") or (own == "weight" and tensor.dtype.itemsize == 1)
            if packed:
                raise ValueError(
                    f"{type(model).__name__} is quantized ({name} is a {type(module).__name__}, whose {own} is "
                    f"{str(tensor.dtype).removeprefix('torch.')}), and {method} needs float weights; load it without "
                    "quantization_config"
                )


def refuse_encoders(model: nn.Module, method: str) -> None:
    """Raises a ValueError if a model of transformers does not predict the next token, or has an encoder too."""
    config = getattr(model, "config", None)
    generates = getattr(model, "can_generate", None)
    if getattr(config, "is_encoder_decoder", False):
        kind = "has an encoder and a decoder"
    elif callable(generates) and not generates():
        kind = "does not predict the next token"
    else:
        return
    raise ValueError(
        f"{type(model).__name__} {kind}, and {method} trains decoders only; load a model with AutoModelForCausalLM"
    )


def _text_decoder(model: nn.Module) -> str:
    """What names of the decoder's modules begin with in a model that sees or hears too; "": it is the whole model."""
    config = getattr(model, "config", None)
    others = any(getattr(config, f"{kind}_config", None) is not None for kind in ("vision", "audio"))
    if not others or not hasattr(model, "get_decoder"):
        return ""
    decoder = model.get_decoder()  # type: ignore[operator]
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")


def _find(
    model: nn.Module, kind: str, layouts: tuple[Layout, ...]
) -> Iterator[tuple[tuple[str, Layout, dict[str, Linear], Linear, str], dict[str, nn.Module]]]:
    refuse_mixtures(
        model,
        "which the probes do not support: a token passes only some of its neurons. Take a dense model, or give the "
        "modules to watch: modules={name: module}",
    )
    anything, text = False, _text_decoder(model)
    for name, module in model.named_modules():
        if not f"{name}.".startswith(text):
            continue
        children = dict(module.named_children())
        layout = next((x for x in layouts if all(c in children for c in (*x.into, x.out))), None)
        if layout is None:
            continue
        anything = True
        prefix = f"{name}." if name else ""
        for child in (*layout.into, layout.out):
            layer = children[child]
            if not is_transposed(layer) and not (hasattr(layer, "in_features") and hasattr(layer, "out_features")):
                raise ValueError(
                    f"{prefix}{child} is a {type(layer).__name__}, where a torch.nn.Linear or transformers' Conv1D was "
                    "expected. Give the modules to watch: modules={name: module}"
                )
        into = {f"{prefix}{child}": children[child] for child in layout.into}
        yield (name, layout, into, children[layout.out], f"{prefix}{layout.out}"), children
    if not anything:
        looked_for = "; ".join(" + ".join((*layout.into, layout.out)) for layout in layouts)
        kinds = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if hasattr(m, "weight")})
        raise ValueError(
            f"{type(model).__name__} has no {kind} that is known here. Looked for modules with the children: "
            f"{looked_for}. Its layers with a weight are called: {', '.join(kinds) or 'none'}. "
            "Give the modules to watch: modules={name: module}"
        )
