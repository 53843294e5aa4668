"""LoRA adapters of PEFT that stay orthogonal to what a memory protects.

An adapter changes its layer by ΔW = s B A, so A U = 0 is enough for ΔW U = 0: B is free, and A lives in the complement
of the basis U of its base layer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sparse_cl.optim.memory_adamw import AdapterBases
from sparse_cl.subspace import Subspace, SubspaceMemory

#: Of LoraConfig.init_lora_weights. All others change the base weight or start B elsewhere than at zero.
_PLAIN = (True, False, "gaussian")


@torch.no_grad()
def orthogonal_lora(peft_model: nn.Module, memory: SubspaceMemory, adapter_name: str = "default") -> AdapterBases:
    """Draws an adapter again, outside the directions that a memory protects of its base layers.

    Each ``lora_A`` (r, n) is drawn as PEFT draws it (uniform on ±1/√n), its rows are projected to the complement of the
    base layer's basis, and scaled so that their mean square norm is again PEFT's, 1/3. Each ``lora_B`` becomes zero.
    Nothing else of the model changes. For ΔW = s B A to stay outside too, train it by
    ``SubspaceProjectedAdamW(..., memory=returned, rest="train")``, which keeps every update of A there and trains B
    freely. rsLoRA is LoRA with another scale s, and works the same.

    Where A is in half precision its rounding alone puts about 1e-6 of its energy back inside; PEFT keeps adapters in
    float32 unless ``autocast_adapter_dtype=False``.

    Args:
        peft_model: of ``peft.get_peft_model``, or any module with LoRA layers of PEFT inside.
        memory: made from the base model before PEFT wrapped it; it knows the weights themselves, not only their names.
        adapter_name: which adapter; others stay as they are.

    Returns:
        ``{weight: subspace to keep out of}``, for each lora_A of a layer that has a basis, and for what else is
        trained and the memory knows: copies in ``modules_to_save``, and what was unfrozen. Empty before the first
        domain. A saturated layer is in it: its A is zero and stays so, and a warning names it. Another warning names
        what would be trained unprotected: embeddings, tokens, other adapters. What is unfrozen later, the optimizer
        names.

    Raises:
        ValueError: no LoRA layer; no adapter of that name; a base layer that the memory does not track; DoRA or
            another variant (DoRA rescales all of W, whatever A is); an initialization that changes the base weight.
            The model is as before then.
    """
    layers = dict(_lora_layers(peft_model))
    if not layers:
        raise ValueError(
            f"peft_model: {type(peft_model).__name__} has no LoRA layer; wrap it by peft.get_peft_model with LoRA"
        )
    having = {name: layer for name, layer in layers.items() if adapter_name in _adapters(layer)}
    if not having:
        known = sorted({adapter for layer in layers.values() for adapter in _adapters(layer)})
        raise ValueError(
            f"adapter_name: the model has no adapter {adapter_name!r}; it has {', '.join(known) or 'none'}"
        )
    _check_config(peft_model, adapter_name)
    subspaces = {name: _subspace(name, layer, memory, adapter_name) for name, layer in having.items()}

    kept = _beside(peft_model, having, memory, adapter_name)
    saturated = []
    for name, layer in having.items():
        a, subspace = layer.lora_A[adapter_name].weight, subspaces[name]
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        layer.lora_B[adapter_name].weight.zero_()
        if subspace is None or subspace.rank == 0:
            continue
        kept[a] = subspace
        if subspace.free == 0:
            saturated.append(name)
            a.zero_()
            continue
        outside = subspace.project_out_(a.to(torch.promote_types(a.dtype, torch.float32)))
        a.copy_(outside.mul_(math.sqrt(subspace.width / subspace.free)))
    if saturated:
        warnings.warn(
            f"{len(saturated)} of {len(having)} LoRA layers have no free direction left: their lora_A is zero and they "
            f"learn nothing; the first is {saturated[0]}. Lower the memory's energy or max_rank to leave room",
            stacklevel=2,
        )
    return AdapterBases(kept, [layer.lora_B[adapter_name].weight for layer in having.values()])


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's LoRA layers by what they hold, so that peft need not be imported."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_A") and hasattr(module, "lora_B"):
            yield name, module


def _beside(model: nn.Module, layers: dict[str, Any], memory: SubspaceMemory, adapter: str) -> dict[Any, Subspace]:
    """The subspaces of what is trained beside an adapter; a warning names matrices that have none."""
    adapters = {id(getattr(layer, name)[adapter].weight) for layer in layers.values() for name in ("lora_A", "lora_B")}
    originals: dict[int, nn.Parameter] = {}
    embeddings: set[int] = set()
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if isinstance(module, nn.Embedding):
            embeddings.update(map(id, module.parameters()))
        copies = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict) and hasattr(module, "original_module"):
            own = dict(module.original_module.named_parameters())
            originals |= {id(p): own[name] for copy in copies.values() for name, p in copy.named_parameters()}
    kept: dict[Any, Subspace] = {}
    unprotected = []
    for name, param in model.named_parameters():
        if not param.requires_grad or param.dim() < 2 or id(param) in adapters or not memory.domains:
            continue
        original = originals.get(id(param), param)
        subspace = memory.subspace(original) if memory.has_seen(original) else None
        # A mapping of bases cannot say that a weight is transposed, and an embedding has no inputs of this kind.
        if subspace is None or id(param) in embeddings or memory.is_transposed(original):
            unprotected.append(name)
        else:
            kept[param] = subspace.to(param.device)
    if unprotected:
        warnings.warn(
            f"peft_model: {len(unprotected)} parameters beside adapter {adapter!r} would be trained unprotected: "
            f"{', '.join(unprotected[:4])}; freeze them with requires_grad_(False), or leave them out of "
            "modules_to_save and trainable_token_indices",
            stacklevel=3,
        )
    return kept


def refuse_variant(argument: str, name: str, layer: Any, adapter: str) -> None:
    """Raises a ValueError if an adapter of a layer changes the weight by more than B A, as DoRA's does."""
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None:
        kind = getattr(variant, "__name__", type(variant).__name__)
        raise ValueError(
            f"{argument}: adapter {adapter!r} of {name} is a variant of LoRA ({kind}), whose change of the weight is "
            "more than B A; make it with a plain LoraConfig (use_rslora=True is fine, use_dora=True is not)"
        )


def _adapters(layer: Any) -> set[str]:
    return {*layer.lora_A, *getattr(layer, "lora_embedding_A", ())}


def _check_config(model: nn.Module, adapter_name: str) -> None:
    config = getattr(model, "peft_config", {}).get(adapter_name)
    init = getattr(config, "init_lora_weights", True)
    if init not in _PLAIN:
        raise ValueError(
            f"adapter_name: adapter {adapter_name!r} was made with init_lora_weights={init!r}, which the fresh start "
            "would undo in part, as it may have changed the base weights; make it with init_lora_weights=True"
        )


def _subspace(name: str, layer: Any, memory: SubspaceMemory, adapter_name: str) -> Subspace | None:
    refuse_variant("peft_model", name, layer, adapter_name)
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    # Embeddings hold their adapter elsewhere, and no input directions to protect.
    if adapter_name not in layer.lora_A or weight is None:
        raise ValueError(f"peft_model: {name} adapts a {type(base).__name__}; expected torch.nn.Linear only")
    if adapter_name in getattr(layer, "merged_adapters", ()):
        raise ValueError(
            f"peft_model: the adapter {adapter_name!r} is merged into {name}, and drawn anew it could not be taken out "
            "again; call peft_model.unmerge_adapter() first"
        )
    try:
        subspace = memory.subspace(weight)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"memory: it does not track the base layer of {name} ({type(base).__name__}); make it from the same model, "
            "or leave this layer out of target_modules"
        ) from error
    return None if subspace is None else subspace.to(layer.lora_A[adapter_name].weight.device)
