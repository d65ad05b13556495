"""Finds the included recipes, in a checkout and in an installed wheel."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.errors import PROGRAM

# Links in a checkout, folders in a wheel. A copy of a checkout may have lost its links.
_LINKED = PROGRAM / "singularity_at_scale"
PACKAGED = _LINKED if (_LINKED / "configs").is_dir() else PROGRAM
RECIPES = {"configs", "deepspeed_configs"}


def find_file(name: str | Path) -> Path | None:
    """The file at path `name`; else the packaged recipe of that name, such as configs/pretrain.yaml; else None."""
    if Path(name).is_file():
        return Path(name)
    normalized = Path(os.path.normpath(name))
    packaged = PACKAGED / normalized
    return packaged.resolve() if RECIPES.intersection(normalized.parts[:1]) and packaged.is_file() else None


def packaged_folder(name: str) -> str:
    """A packaged folder for messages: relative to the current folder if it is inside of it."""
    path = (PACKAGED / name).resolve()
    return f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}/"
