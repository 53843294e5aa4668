"""`--set METHOD.OPTION=VALUE`: values for the options of methods, typed as the constructors have them."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Sequence
from typing import Any

from sparse_cl.methods import METHODS, Method


def _kinds(method: type[Method], option: str) -> tuple[Any, ...]:
    """The types that an option may have, `NoneType` among them; a `Literal` as it is."""
    parameter = inspect.signature(method.__init__).parameters[option]
    hint = typing.get_type_hints(method.__init__).get(option)
    if hint is None:
        return (type(parameter.default),)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _convert(text: str, kind: Any) -> Any:
    """A text as a value of one type; ValueError if it is none."""
    if kind is type(None):
        if text.lower() in ("none", "null"):
            return None
        raise ValueError(text)
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError(text)
    if typing.get_origin(kind) is typing.Literal:
        for choice in typing.get_args(kind):
            if text == str(choice):
                return choice
        raise ValueError(text)
    return kind(text)


def _words(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "none"}
    return names.get(kind, str(kind))


def known_options(method: type[Method]) -> str:
    """The options of a method with their defaults, in words."""
    defaults = inspect.signature(method.__init__).parameters
    return ", ".join(f"{name}={defaults[name].default}" for name in method.options) or "none"


def parse_set(entries: Sequence[str]) -> dict[str, dict[str, Any]]:
    """METHOD → option → value.

    Raises:
        ValueError: an entry of another form; a method or an option that there is not; a value of another type.
    """
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        left, equals, text = entry.partition("=")
        name, dot, option = left.strip().partition(".")
        if not equals or not dot or not option:
            raise ValueError(f"--set {entry}: expected METHOD.OPTION=VALUE, as in orthogonal.energy=0.9")
        if name not in METHODS:
            raise ValueError(f"--set {entry}: unknown method {name!r}; there are {', '.join(METHODS)}")
        method = METHODS[name]
        if option not in method.options:
            raise ValueError(f"--set {entry}: {name} has no option {option!r}; it has: {known_options(method)}")
        if option in found.get(name, {}):
            raise ValueError(f"--set {entry}: {name}.{option} is given twice")
        kinds = _kinds(method, option)
        # "none" and numbers first: every text is a word.
        for kind in sorted(kinds, key=lambda kind: (kind is not type(None), kind is str)):
            try:
                found.setdefault(name, {})[option] = _convert(text.strip(), kind)
                break
            except ValueError:
                continue
        else:
            raise ValueError(f"--set {entry}: expected {' or '.join(map(_words, kinds))}, got {text!r}")
    return found
