"""The names of an optimizer's parameters, and what is given by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparse_cl.subspace.layers import plain_name

from .leaf import owner_of, whole_of

Groups = Sequence[Mapping[str, Any]]
T = TypeVar("T")
FSDP2 = (
    "split the model by FSDP2 (torch's fully_shard), which leaves it its parameters, and make the optimizer after that"
)
"""What to do instead, where an engine flattens parameters."""
# A Mapping is invariant in its key: Tensor | str would refuse both dict[str, T] and dict[Parameter, T].
ByParameter = Mapping[Any, T]
"""Values by parameter, or by its name."""


def plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside wrappers such as accelerate's.

    Raises:
        TypeError: no optimizer.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer


def parameters_of(groups: Groups) -> Iterator[Tensor]:
    """All parameters, in the order in which checkpoints number them."""
    return chain.from_iterable(group["params"] for group in groups)


def names_of(groups: Groups) -> dict[Tensor, str]:
    """The names of the parameters that have one."""
    return {
        param: name
        for group in groups
        for param, name in zip(group["params"], group.get("param_names", ()), strict=False)
    }


def name_of(groups: Groups, param: Tensor) -> str:
    """What messages call a parameter: its quoted name, or its place."""
    name = names_of(groups).get(param)
    if name is not None:
        return repr(name)
    places = ((i, number) for number, group in enumerate(groups) for i, p in enumerate(group["params"]) if p is param)
    return next((f"number {i} of group {number}" for i, number in places), "of another optimizer")


def label_of(groups: Groups, param: Tensor) -> str:
    """A parameter's name without quotes, or else its place."""
    return names_of(groups).get(param) or name_of(groups, param)


def by_name(groups: Groups) -> dict[str, Tensor]:
    """Parameters by name; the weight of a leaf also goes by its own name."""
    names = {name: param for param, name in names_of(groups).items()}
    leaves = {name: param for name, param in names.items() if owner_of(param) is not None}
    return names | {name.removesuffix("active") + "weight": param for name, param in leaves.items()}


def named(names: Mapping[str, Tensor], key: str) -> Tensor | None:
    """The parameter of a name, or else of one that differs in wrappers alone: torch.compile's, DDP's, PEFT's."""
    if key in names:
        return names[key]
    found = [param for name, param in names.items() if _bare(name) == _bare(key)]
    return found[0] if found and all(param is found[0] for param in found) else None


def _bare(name: str) -> str:
    name = plain_name(name).removeprefix("module.").removeprefix("base_model.model.").removeprefix("module.")
    return name.replace(".base_layer.", ".")


def by_param(groups: Groups, given: ByParameter[Any], argument: str, what: str) -> dict[Tensor, Any]:
    """``given`` with its keys replaced by the parameters that they stand for.

    Args:
        groups: the optimizer's parameter groups.
        given: values by parameter, by the weight of a leaf, or by the name of either.
        argument, what: for messages: what ``given`` is called and what its values are.

    Raises:
        TypeError: ``given`` is not a mapping.
        ValueError: a key is neither a parameter nor a name, or stands for a parameter that another key stands for.
        RuntimeError: parameters have been flattened.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"{argument}: expected {{parameter or name: {what}}}, got {type(given).__name__}")
    if given:
        refuse_flattened(groups, argument)
    own = {id(param): param for param in parameters_of(groups)}
    own |= {id(whole_of(param)): param for param in own.values()}
    names = by_name(groups)
    resolved: dict[Tensor, Any] = {}
    for key, value in given.items():
        if not isinstance(key, str):
            if id(key) not in own:
                raise ValueError(
                    f"{argument}: a key is not a parameter of this optimizer; expected parameters or their names. If "
                    f"ZeroRedundancyOptimizer gave it some of the parameters only, {FSDP2}"
                )
            param = own[id(key)]
        elif (found := named(names, key)) is not None:
            param = found
        elif names:
            raise ValueError(
                f"{argument}: no parameter is named {key!r}; the first names are {', '.join(list(names)[:3])}"
            )
        else:
            raise ValueError(
                f"{argument}: {key!r} is a name, but the parameters have none; pass model.named_parameters() as "
                "params, or use parameters as keys"
            )
        if param in resolved:
            raise ValueError(f"{argument}: parameter {name_of(groups, param)} is given twice, by name and by itself")
        resolved[param] = value
    return resolved


def refuse_flattened(groups: Groups, argument: str) -> None:
    """Raises a RuntimeError if an engine has flattened or emptied parameters; FSDP1 and ZeRO-3 leave marks on them."""
    for param in parameters_of(groups):
        engine = "FSDP1" if getattr(param, "_fsdp_flattened", False) else "ZeRO" if hasattr(param, "ds_shape") else ""
        if engine:
            raise RuntimeError(
                f"{argument}: {engine} has flattened the parameters, so that their rows are not what the optimizer "
                f"steps; {FSDP2}"
            )


def refuse_lost(ruled: Iterable[Tensor], groups: Groups) -> None:
    """Raises a RuntimeError if a parameter that has a mask or projection is no longer the optimizer's, or flattened."""
    own = set(map(id, parameters_of(groups)))
    ruled = list(ruled)
    lost = next((param for param in ruled if id(param) not in own), None)
    if lost is not None:
        raise RuntimeError(
            "params: the optimizer steps other tensors than it was given: a mask or projection is for a parameter of "
            f"shape {tuple(getattr(lost, 'ds_shape', lost.shape))}, which is not among its parameters any more, and "
            f"would be ignored. ZeRO, FSDP1 and fp16 wrappers flatten or copy parameters; {FSDP2}"
        )
    if ruled:
        refuse_flattened(groups, "params")
