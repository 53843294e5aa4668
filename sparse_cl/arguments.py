"""Command-line options from dataclasses: an option's name, type, default and help stand once, at its field."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "none"}


def option(default: Any, help: str, *, least: int | None = None, group: str | None = None, **how: Any) -> Any:
    """A dataclass field that is also an option of a command.

    Args:
        default: `dataclasses.MISSING` makes it required.
        least: the smallest number that is allowed.
        group: heading in `--help`.
        how: for `ArgumentParser.add_argument`; and `flag`, where it is not the field's name with dashes.
    """
    return dataclasses.field(default=default, metadata={"help": help, "least": least, "group": group, **how})


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """Adds an option for each field of a dataclass that was made by `option`."""
    hints = typing.get_type_hints(settings)
    groups: dict[str | None, Any] = {None: parser}
    for field in (field for field in dataclasses.fields(settings) if "help" in field.metadata):
        how = dict(field.metadata)
        flag, group, least = how.pop("flag", "--" + field.name.replace("_", "-")), how.pop("group"), how.pop("least")
        kinds = tuple(kind for kind in kinds_of(hints[field.name]) if kind is not type(None))
        if kinds == (bool,):
            how["action"] = "store_true"
        elif typing.get_origin(kinds[0]) is Literal:
            how["choices"] = typing.get_args(kinds[0])
        elif not how.keys() & {"nargs", "action"}:
            how["type"] = _reader(kinds, least)
        if flag.startswith("-"):
            how |= {"dest": field.name, "required": field.default is dataclasses.MISSING}
            silent = any(field.default is value for value in (dataclasses.MISSING, None, False, ()))
            if not silent and "(default" not in how["help"]:
                shown = field.default if isinstance(field.default, tuple) else (field.default,)
                how["help"] += f" (default: {','.join(map(str, shown))})"
        if field.default is not dataclasses.MISSING:
            how["default"] = field.default
        if how.get("nargs") == "+" and field.default in (dataclasses.MISSING, ()):
            how |= {"action": "extend", "default": []}  # given twice, an option adds to the first
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(flag, **{**how, "help": how["help"].replace("%", "%%")})


def chosen(settings: type, arguments: argparse.Namespace, **others: Any) -> Any:
    """An instance of the dataclass, from what was parsed of its options and from `others`."""
    parsed = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(settings) if f.name in arguments}
    several = {name: tuple(value) for name, value in parsed.items() if isinstance(value, list)}
    return settings(**{**parsed, **several, **others})


def check_options(settings: Any) -> None:
    """Whether the fields of a dataclass hold what their options allow.

    Raises:
        ValueError: a number is too small, or a word is none of the choices.
    """
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, least, kinds = getattr(settings, field.name), field.metadata.get("least"), kinds_of(hints[field.name])
        if least is not None and value is not None and value < least:
            raise ValueError(f"{field.name}: expected at least {least}, got {value}")
        choices = [choice for kind in kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
        if choices and value not in choices and not (value is None and type(None) in kinds):
            raise ValueError(f"{field.name}: expected {_words(kinds)}, got {value!r}")


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The types that a hint allows: those of a union, or the hint itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def convert(text: str, kinds: tuple[Any, ...]) -> Any:
    """A text as a value of the first of the types that takes it.

    Raises:
        ValueError: none does; the message says what was expected.
    """
    # "none" and numbers first: every text is a word.
    for kind in sorted(kinds, key=lambda kind: (kind is not type(None), kind is str)):
        try:
            return _value(text, kind)
        except (ValueError, KeyError):
            continue
    raise ValueError(f"expected {_words(kinds)}, got {text!r}")


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _value(text: str, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        return tuple(_value(part, typing.get_args(kind)[0]) for part in names(text))
    choices: dict[str, Any] = {}
    if kind is type(None):
        choices = {"none": None, "null": None}
    elif kind is bool:
        choices = {"true": True, "false": False}
    elif typing.get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(kind)}
    return choices[text if text in choices else text.lower()] if choices else kind(text)


def _words(kinds: tuple[Any, ...]) -> str:
    """Types as a user calls their values."""
    found = [_WORDS.get(kind) or " or ".join(map(str, typing.get_args(kind))) for kind in kinds]
    return "whole numbers, N[,N…]" if kinds == (tuple[int, ...],) else " or ".join(found)


def _reader(kinds: tuple[Any, ...], least: int | None) -> Callable[[str], Any]:
    """What `ArgumentParser` reads an option by."""

    def read(text: str) -> Any:
        try:
            value = convert(text, kinds)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
        return value

    return read


positive = _reader((int,), 1)
"""Reads a whole number of at least 1."""
