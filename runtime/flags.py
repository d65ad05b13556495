"""Command lines made of dataclasses: the field defines the name, type, default and help of a flag."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields, replace
from typing import Any, TypeVar

T = TypeVar("T")

_FLAG, _PART = "flag", "part"


def flag(default: Any, help: str, **options: Any) -> Any:
    """A dataclass field that is a flag; `default` may be a function that makes it, `%(default)s` in `help` shows it.

    options: `group`, its heading in `--help`; others are those of `ArgumentParser.add_argument`.
    """
    factory: Any = default if callable(default) else MISSING
    value = MISSING if callable(default) else default
    metadata = {_FLAG: {"help": help.replace("%(default)s", str(default)), **options}}
    return field(default=value, default_factory=factory, metadata=metadata)


def part(kind: Callable[[], Any], group: str = "") -> Any:
    """A dataclass field that is a dataclass of more flags; `group`: their heading in `--help`."""
    return field(default_factory=kind, metadata={_PART: group})


def add_flags(parser: argparse.ArgumentParser, kind: Any) -> None:
    """Add the flags of dataclass `kind`; the parser returns only those that are given."""
    groups: dict[str, argparse._ActionsContainer] = {"": parser}
    for heading, name, hint, options in _flags_of(kind, ""):
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        if hint is bool:
            options["action"] = "store_true"
        elif "choices" not in options and hint in (int, float):
            options.setdefault("type", hint)
        groups[heading].add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, **options)


def _flags_of(kind: Any, heading: str) -> typing.Iterator[tuple[str, str, Any, dict[str, Any]]]:
    hints = typing.get_type_hints(kind)
    for each in fields(kind):
        if _PART in each.metadata:
            yield from _flags_of(hints[each.name], each.metadata[_PART])
        elif _FLAG in each.metadata:
            options = dict(each.metadata[_FLAG])
            yield options.pop("group", heading), each.name, hints[each.name], options


def changed(settings: T, values: Mapping[str, Any]) -> T:
    """`settings` with other values, also of its parts, which may be given whole; raises TypeError for unknown names."""
    left, own = dict(values), {}
    for each in fields(typing.cast(Any, settings)):
        if each.name in left:
            own[each.name] = left.pop(each.name)
        elif _PART in each.metadata:
            inner = getattr(settings, each.name)
            names = {item.name for item in fields(inner)}
            own[each.name] = changed(inner, {name: left.pop(name) for name in names & left.keys()})
    return replace(typing.cast(Any, settings), **own, **left)


def positive(text: str) -> int:
    """The type of a flag for whole numbers from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number
