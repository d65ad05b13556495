"""Published weights and vocabularies inside installed packages: found as files, no code of theirs runs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from runtime.errors import MissingError

PREFIX = "package:"


def find_in_package(name: str, patterns: Sequence[str], setting: str) -> Path:
    """The first file of the package `name` ("package:" before it) that matches a pattern, by the order of these.

    Raises MissingError, naming the setting, when the package is not installed or has no such file.
    """
    package = name.removeprefix(PREFIX)
    try:
        listed = files(package) or []
    except PackageNotFoundError:
        raise MissingError(f"{setting}: the package {package} is not installed: pip install {package}") from None
    for pattern in patterns:
        for file in listed:
            if file.match(pattern):
                return Path(str(file.locate()))
    raise MissingError(f"{setting}: the package {package} has no {' or '.join(patterns)}: choose another one")
