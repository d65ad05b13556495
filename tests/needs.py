"""What some tests need beside this project's own packages: they are left out where it is missing, and the end of the
run names them with the reason and the command that installs it."""

from __future__ import annotations

import importlib
import os
import shutil
from types import ModuleType

import pytest

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # an administrator's programs too
LEFT_OUT = "left out: "


def program(name: str) -> str | None:
    """Path of a program, an administrator's too."""
    return shutil.which(name, path=PATH)


def lacks(*programs: str, root: str = "") -> str:
    """Why this machine cannot run a test that starts these programs; empty where it can. root: what needs root."""
    if root and os.geteuid() != 0:
        return f"not root, and {root}"
    missing = [name for name in programs if program(name) is None]
    return f"{', '.join(missing)} not installed: `make packages` installs what tests need" if missing else ""


def leave_out(reason: str) -> None:
    """End the test as left out if there is a reason."""
    if reason:
        pytest.skip(LEFT_OUT + reason)


def module(name: str, package: str) -> ModuleType:
    """A module of a package that this project can do without; ends the test as left out where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        pytest.skip(f"{LEFT_OUT}{package} not installed: `pip install {package}`, or `make install`")
