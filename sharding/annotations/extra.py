"""Extra columns: values of a sample beside its texts, such as a score, that annotations or the JSON in a tar hold."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from sharding.annotations.items import plain

KINDS = {"float": "a number", "int": "a whole number of 64 bits", "bool": "true or false", "str": "a text"}
BOOLS = {"true": True, "1": True, "false": False, "0": False, "nan": None}


def extra_value(value: Any, kind: str) -> Any:
    """A value, also one written as text, as the type that `kind` (of KINDS) names; None for null, NaN or empty.

    Raises ValueError: it is not of that type; the message says what it must be.
    """
    if value is None or (isinstance(value, Real) and value != value) or (kind != "str" and plain(value) == ""):
        return None
    try:
        if kind == "str" and not isinstance(value, bytes | list | dict):
            return plain(value).encode().decode()  # fails with half a surrogate pair, which the index cannot hold
        if kind == "bool":
            return BOOLS[plain(value).lower()]
        if kind in ("int", "float") and not isinstance(value, bool):
            number = float(value)
            if math.isnan(number):
                return None
            if kind == "float" and math.isfinite(number):
                return number
            whole = value if isinstance(value, int) else int(plain(number) if "." in plain(value) else plain(value))
            if number == int(number) and -(2**63) <= whole < 2**63:
                return whole
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{KINDS[kind]} ({kind}), not {str(value)[:60]!r}")
