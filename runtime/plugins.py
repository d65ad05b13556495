"""A user's own modules, named by the setting `plugins`, and the registries that they add implementations to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, Generic, TypeVar

from runtime.errors import MissingError, UserError
from runtime.settings import nearest

T = TypeVar("T")


class NoModuleError(MissingError):
    """There is no module of this name."""


class Registry(Generic[T]):
    """Implementations by the name that a setting chooses.

    As a decorator, `@REGISTRY("name")`, it adds a function or a class. Iterating gives the names.
    """

    def __init__(self, setting: str, others: str = "") -> None:
        """setting: the dotted key that chooses among them; others: what follows their names in messages."""
        self._setting, self._others = setting, others
        self._known: dict[str, T] = {}

    def __call__(self, name: str) -> Callable[[T], T]:
        """Add what is decorated under `name`; what is defined again, as by a notebook's cell, replaces itself.

        Raises UserError if another implementation has the name.
        """

        def add(implementation: T) -> T:
            if name in self._known and _definition(implementation) != _definition(self._known[name]):
                raise UserError(f"{self._setting}={name} exists already: register yours under another name")
            self._known[name] = implementation
            return implementation

        return add

    def __getitem__(self, name: str) -> T:
        """The implementation called `name`. Raises UserError, with all names, the nearest first, if there is none."""
        if name in self._known:
            return self._known[name]
        known = dict.fromkeys([*nearest(name, self._known), *sorted(self._known), *filter(None, [self._others])])
        listed = ", ".join(known) or "none"
        raise UserError(
            f"{self._setting} is {name!r}, must be one of {listed}; a module of your own that registers it must be "
            "named in plugins, plugins=[my_module], or in Python be imported before"
        )

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)


def _definition(implementation: object) -> object:
    """Where a function or a class is defined; another object stands for itself."""
    name = getattr(implementation, "__qualname__", None)
    return (getattr(implementation, "__module__", None), name) if name else implementation


def build_with_options(kind: Callable[..., T], setting: str, options: Mapping[str, Any], *arguments: object) -> T:
    """`kind(*arguments, **options)`; raises UserError when `kind` does not take one of the options, or lacks one.

    setting: the dotted key of the options, for messages.
    """
    taken = signature(kind)
    try:
        taken.bind(*arguments, **options)
    except TypeError as error:
        own = list(taken.parameters)[len(arguments) :]
        listed = f"are {', '.join(own)}" if own else "none"
        raise UserError(f"{setting}: {error}; the options of {kind.__qualname__} {listed}") from None
    return kind(*arguments, **options)


def load_plugins(names: Sequence[str], beside: Path | None = None) -> None:
    """Import modules by name: files or packages in the working folder, in folder `beside`, or installed ones.

    Modules of one folder can import each other. A module is imported once. An error in its code shows its traceback.
    Raises NoModuleError if there is no such module, UserError if another module has the name.
    """
    folders = [folder.resolve() for folder in (Path.cwd(), beside) if folder is not None]
    for name in names:
        if name.endswith(".py") or name == "__main__" or not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"plugins names {name!r}: write the name of a module without .py, such as my_losses")
        parts = name.replace(".", "/")
        files = [(folder, folder / f"{parts}{end}") for folder in folders for end in (".py", "/__init__.py")]
        folder, file = next(((folder, file) for folder, file in files if file.is_file()), (None, None))
        if file is not None:
            if str(folder) not in sys.path:
                sys.path.append(str(folder))  # at the end: its other files must not replace installed modules
        elif find_spec(name.partition(".")[0]) is None:
            listed = " or ".join(dict.fromkeys(map(str, folders)))
            raise NoModuleError(f"plugins names {name}, but there is no {parts}.py in {listed}, and no such package")
        module = import_module(name)
        if file is not None and Path(module.__file__ or "").resolve() != file.resolve():
            raise UserError(f"plugins names {name}, which {file} is, but also {module.__file__}: rename your file")
