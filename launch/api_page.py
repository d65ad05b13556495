"""`python -m launch.api_page > docs/api.md`: the page of all public names, made from their docstrings."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any

import eval
import launch
import loaders
import model
import preprocessing
import runtime
import sharding
import storage
import train
from runtime.errors import ROOMS
from runtime.plugins import Registry
from runtime.settings import declarations

DOCUMENTED = {*ROOMS, "huggingface_hub"}  # whose methods are listed, those of base classes too
PACKAGES = (model, loaders, preprocessing, eval, train, sharding, runtime, storage, launch)
HEAD = """\
# API

The public names of each package, its `__all__`, with their docstrings. Other names may change at any time. This page
is made from the code by `python -m launch.api_page > docs/api.md`. In shapes, B is the batch, N visuals, M texts,
T frames, L tokens, D the width, E `embed_dim`. Examples: [extending](extending.md), [Python](how-to/python.md).
"""


def page() -> str:
    """The page in Markdown: a section a package, a heading a name."""
    return "\n".join([HEAD, *(line for package in PACKAGES for line in _package(package))])


def _package(package: ModuleType) -> Iterator[str]:
    yield f"## {package.__name__}\n\n{inspect.getdoc(package)}\n"
    if not package.__all__:
        yield "Commands only, no public names.\n"
    for name in package.__all__:
        value = getattr(package, name)
        yield f"### {package.__name__}.{name}\n"
        if isinstance(value, Registry):
            yield f'Registry: `@{name}("NAME")` adds to it. Built in: {_built_in(value)}.\n'
        else:
            yield f"```text\n{name}{_signature(value)}\n```\n\n{_text(value)}\n"
            yield from _methods(name, value) if inspect.isclass(value) else ()


def _built_in(registry: Registry[Any]) -> str:
    """The names of a registry that are implemented here; tests and plugins may have added others."""
    ours = sorted(name for name in registry if registry[name].__module__.partition(".")[0] in ROOMS)
    return ", ".join(f"`{name}`" for name in ours) or "none"


def _methods(owner: str, kind: Any) -> Iterator[str]:
    """The public methods of a class, and of its bases those with the first paragraph of their text."""
    rows = []
    for name, value in inspect.getmembers_static(kind):
        module = getattr(inspect.unwrap(getattr(value, "__func__", value)), "__module__", "") or ""
        if name.startswith("_") or module.partition(".")[0] not in DOCUMENTED or not inspect.isroutine(value):
            continue
        paragraphs = _text(getattr(kind, name)).split("\n\n")
        shown = " ".join(paragraphs if name in vars(kind) else paragraphs[:1]).replace("\n", " ")
        rows.append(f"- `{owner}.{name}{_signature(getattr(kind, name))}`: {shown}\n")
    if rows:
        yield "".join(rows)


def _signature(value: Any) -> str:
    """The arguments and the result, on one line; of a class with settings as fields, "(KEY=VALUE)"."""
    if inspect.isclass(value) and issubclass(value, Exception):
        return "(message)"
    if inspect.isclass(value) and is_dataclass(value) and any(each.help for each in declarations(value).values()):
        return "(KEY=VALUE)"
    if inspect.isclass(value) and value.__init__ is not object.__init__:
        value = value.__init__  # Python 3.11.2 would show a mixin's __new__
    resolved = re.sub(r"ForwardRef\('([^']*)'\)", r"\1", str(inspect.signature(value)))
    unquoted = re.sub(r"(: |-> )'([^']*)'", r"\1\2", resolved)
    return re.sub(r"\(self(, )?", "(", re.sub(r" at 0x[0-9a-f]+", "", unquoted))


def _text(value: Any) -> str:
    return inspect.getdoc(value) or ""


if __name__ == "__main__":
    sys.stdout.write(page())
