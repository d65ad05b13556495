"""Declares a setting: its default, and whether a resumed run may change it."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any

FIXED, EVALUATION, FREE = "fixed", "evaluation", "free"
_KEY = "resumed"


def fixed(default: Any = MISSING, factory: Callable[[], Any] | Any = MISSING) -> Any:
    """A dataclass field that decides what is learned or which model is the best: a resumed run must keep it."""
    return _declare(FIXED, default, factory)


def evaluation(default: Any = MISSING, factory: Callable[[], Any] | Any = MISSING) -> Any:
    """A dataclass field that changes evaluations only: a resumed run may change it."""
    return _declare(EVALUATION, default, factory)


def free(default: Any = MISSING, factory: Callable[[], Any] | Any = MISSING) -> Any:
    """A dataclass field of places, speed and records, which changes no result: a resumed run may change it."""
    return _declare(FREE, default, factory)


def _declare(change: str, default: Any, factory: Any) -> Any:
    return field(default=default, default_factory=factory, metadata={_KEY: change})


def change_on_resume(kind: type, key: str) -> str | None:
    """FIXED, EVALUATION or FREE for a dotted key of dataclass `kind`; None where no field on its way says so.

    A section may say it for all that is in it.
    """
    for name in key.split("."):
        item = next((item for item in fields(kind) if item.name == name), None)
        if item is None:
            return None
        if _KEY in item.metadata:
            return str(item.metadata[_KEY])
        kind = typing.get_type_hints(kind)[name]
        if not is_dataclass(kind):
            return None
    return None
