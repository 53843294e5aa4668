"""`--set METHOD.OPTION=VALUE`: values for the options of methods, typed as the constructors have them."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Sequence
from typing import Any

from sparse_cl.arguments import convert, kinds_of
from sparse_cl.methods import Method, method_named


def known_options(method: type[Method]) -> str:
    """The options of a method with their defaults, in words."""
    return ", ".join(f"{name}={_default_and_type(method, name)[0]}" for name in method.options) or "none"


def _default_and_type(method: type[Method], option: str) -> tuple[Any, Any]:
    """An option's default and type, of the constructor that names it: a baseline may hand on what it does not name."""
    for kind in method.__mro__:
        init = kind.__dict__.get("__init__")
        if init is not None and option in (parameters := inspect.signature(init).parameters):
            default = parameters[option].default
            return default, typing.get_type_hints(init).get(option, type(default))
    raise AttributeError(f"{method.__name__}: no constructor names its option {option!r}")


def parse_set(entries: Sequence[str]) -> dict[str, dict[str, Any]]:
    """METHOD → option → value.

    Raises:
        ValueError: an entry of another form; a method or an option that does not exist; a value of another type.
    """
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        left, equals, text = entry.partition("=")
        name, dot, option = left.strip().partition(".")
        if not equals or not dot or not option:
            raise ValueError(f"--set {entry}: expected METHOD.OPTION=VALUE, as in orthogonal.energy=0.9")
        if option in found.get(name, {}):
            raise ValueError(f"--set {entry}: {name}.{option} is given twice")
        try:
            method = method_named(name)
            check_option(name, option)
            found.setdefault(name, {})[option] = convert(text.strip(), kinds_of(_default_and_type(method, option)[1]))
        except ValueError as error:
            raise ValueError(f"--set {entry}: {error}") from error
    return found


def check_option(name: str, option: str) -> None:
    """Whether a method has an option.

    Raises:
        ValueError: it has not; those that it has are named.
    """
    method = method_named(name)
    if option not in method.options:
        raise ValueError(f"{name} has no option {option!r}; it has: {known_options(method)}")
