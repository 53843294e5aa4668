"""Turns linear layers of a model into active ones, and back."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

import torch
from torch import nn

from sparse_cl.layout import is_sharded
from sparse_cl.masks import ColumnMask, RowMask

from .active_linear import ActiveLinear, check_mask, leaf_dtype_for


def activate(
    model: nn.Module, masks: Mapping[str, RowMask | ColumnMask], *, leaf_dtype: torch.dtype | None = None
) -> None:
    """Turns the ``nn.Linear`` layers that ``masks`` names into active ones, in place, and freezes everything else.

    Every module, parameter and name stays what it was; each of these layers gets one more parameter, ``active``. All
    other parameters have ``requires_grad`` False and no gradient until :func:`restore`. A layer whose mask is empty
    stays as it is, frozen.

    Args:
        model: holds the layers, at any depth.
        masks: by name of the weight, as in ``model.named_parameters()``.
        leaf_dtype: as for :class:`ActiveLinear`.

    Raises:
        TypeError, ValueError: a name that is not an ``nn.Linear``'s weight, a weight that another layer shares, a mask
            of another kind or shape, no active entry at all, a model that has active layers. The model stays as it was.
    """
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks: expected {{name of a weight: mask}}, got {type(masks).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, ActiveLinear):
            raise ValueError(f"model: {name!r} is an ActiveLinear already; call restore(model) first")
        if is_sharded(getattr(module, "weight", None)) or hasattr(module, "unshard"):
            raise ValueError("model: it is split over processes already; call activate before fully_shard")
    chosen = {name: _layer_of(model, name) for name in masks}
    users = _users(model)
    for name, layer in chosen.items():
        others = users[id(layer.weight)]
        shared = [other for other in others if model.get_submodule(other.rpartition(".")[0]) is not layer]
        if shared:
            raise ValueError(
                f"masks: {name!r} is tied to {', '.join(map(repr, shared))}, whose part of the gradient would be lost; "
                "use SparseMaskedAdamW(masks=...) for it"
            )
        check_mask(masks[name], layer.weight, f"masks: {name!r}")
    dtypes = {name: leaf_dtype_for(layer.weight, leaf_dtype, repr(name)) for name, layer in chosen.items()}
    chosen = {name: layer for name, layer in chosen.items() if masks[name].numel}
    if not chosen:
        raise ValueError(f"masks: no entry of {len(masks)} masks is active, so nothing would be trained")

    remember_frozen(model, [name for name, param in model.named_parameters() if param.requires_grad])
    for param in model.parameters():
        param.requires_grad_(False)
        # An optimizer would step a frozen weight by the gradient of before.
        param.grad = None
    for name, layer in chosen.items():
        layer.__class__ = ActiveLinear
        assert isinstance(layer, ActiveLinear)
        layer._begin(masks[name], dtypes[name])


def write_back(model: nn.Module) -> None:
    """Writes the leaves of all active layers into their weights; other optimizers' steps need it.

    ``optimizer.register_step_post_hook(lambda *_: write_back(model))`` does so after each.
    """
    for layer in _active_layers(model):
        layer.write_back()


def restore(model: nn.Module) -> None:
    """Undoes :func:`activate`: ordinary ``nn.Linear`` layers with the trained weights, ``requires_grad`` as before.

    The weights are the same tensors, written to in place. Optimizers that step the leaves are of no further use. On a
    model without active layers nothing happens.

    Raises:
        ValueError: FSDP2 has split the layers; the model stays as it was.
    """
    layers = _active_layers(model)
    if any(layer._split for layer in layers):
        raise ValueError(
            "model: fully_shard has split its active layers, and holds their leaves. The weights are written, and "
            "model.state_dict() is that of a model without active layers; load it into one"
        )
    for layer in layers:
        layer._end()
    for module in model.modules():
        for name in module.__dict__.pop("frozen_by_activate", ()):
            module.get_parameter(name).requires_grad_(True)


def remember_frozen(model: nn.Module, names: list[str]) -> None:
    """Notes parameters of a module for :func:`restore`, which sets ``requires_grad`` of them again."""
    model.__dict__["frozen_by_activate"] = names


def _active_layers(model: nn.Module) -> list[ActiveLinear]:
    return [module for module in model.modules() if isinstance(module, ActiveLinear)]


def _users(model: nn.Module) -> dict[int, list[str]]:
    """Names of each parameter, by its identity; more than one where weights are tied."""
    users: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(param), []).append(name)
    return users


def _layer_of(model: nn.Module, name: str) -> nn.Linear:
    """The ``nn.Linear`` whose weight has this name."""
    path, _, own = name.rpartition(".")
    try:
        module, _ = model.get_submodule(path), model.get_parameter(name)
    except AttributeError:
        names = [n for n, _ in model.named_parameters()]
        near = get_close_matches(name, names, 1, 0) or names[:1]
        raise ValueError(
            f"masks: the model has no parameter {name!r}{f'; is it {near[0]!r}?' if near else ''}"
        ) from None
    if type(module) is not nn.Linear or own != "weight":
        kind = type(module).__name__
        detail = ", whose weight is (in, out)" if kind == "Conv1D" else ""
        raise TypeError(
            f"masks: {name!r} belongs to a {kind}{detail}; expected the weight of an nn.Linear. Use "
            "SparseMaskedAdamW(masks=...) for it"
        )
    if "forward" in module.__dict__:
        raise TypeError(
            f"masks: {name!r}: the forward of its layer was replaced on the object, which would bypass ActiveLinear; "
            "activate before hooks are added, or remove them"
        )
    return module
