"""Extra columns: values of a sample beside its texts, such as a score, that annotations or the JSON in a tar hold."""

from __future__ import annotations

import math
from typing import Any

from sharding.annotations.items import plain

KINDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "a text"}
BOOLS = {"true": True, "1": True, "false": False, "0": False}


def extra_value(value: Any, kind: str) -> Any:
    """A value, also one written as text, as the type that `kind` (of KINDS) names; None where there is none.

    Raises ValueError: it is not of that type; the message says what it must be.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)) or (value == "" and kind != "str"):
        return None
    try:
        if kind == "str" and not isinstance(value, bytes | list | dict):
            return plain(value)
        if kind == "bool":
            return BOOLS[plain(value).lower()]
        if kind in ("int", "float") and not isinstance(value, bool):
            number = float(value)
            if kind == "float" and math.isfinite(number):
                return number
            if number == int(number):
                return value if isinstance(value, int) else int(plain(number) if "." in plain(value) else plain(value))
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{KINDS[kind]} ({kind}), not {str(value)[:60]!r}")
