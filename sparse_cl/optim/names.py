"""Parameters by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def by_param(
    given: Mapping[Tensor | str, Any],
    own: Mapping[int, Tensor],
    by_name: Mapping[str, Tensor],
    argument: str,
    what: str,
) -> dict[Tensor, Any]:
    """``given`` with names replaced by the parameters that they stand for.

    Args:
        given: values by parameter or name.
        own: parameters of the optimizer by the identity of what stands for them.
        by_name: those that have a name.
        argument, what: for messages: what ``given`` is called and what its values are.

    Raises:
        TypeError: ``given`` is no mapping.
        ValueError: a key that is no parameter nor a name, or one given twice.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"{argument}: expected {{parameter or name: {what}}}, got {type(given).__name__}")
    resolved: dict[Tensor, Any] = {}
    for key, value in given.items():
        if isinstance(key, str):
            if not by_name:
                raise ValueError(
                    f"{argument}: {key!r} is a name, but the parameters have none; pass "
                    "model.named_parameters() as params, or use parameters as keys"
                )
            if key not in by_name:
                raise ValueError(
                    f"{argument}: no parameter is named {key!r}; the first names are {', '.join(list(by_name)[:3])}"
                )
            param = by_name[key]
        elif id(key) in own:
            param = own[id(key)]
        else:
            raise ValueError(f"{argument}: a key is no parameter of this optimizer; expected parameters or their names")
        if param in resolved:
            name = next(name for name, p in by_name.items() if p is param)
            raise ValueError(f"{argument}: parameter {name!r} is given twice, by name and by itself")
        resolved[param] = value
    return resolved
