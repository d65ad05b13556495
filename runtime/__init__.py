"""Code that all packages share: errors, progress, settings, ranks, collectives."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.errors import AccessError, MissingError, UserError
    from runtime.plugins import Registry

__all__ = [
    "AccessError",
    "MissingError",
    "Registry",
    "UserError",
]


def __getattr__(name: str) -> object:
    """A public name, imported when it is first used: most programs need none of them."""
    if name not in __all__:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    from runtime.errors import AccessError, MissingError, UserError  # noqa: F401
    from runtime.plugins import Registry  # noqa: F401

    globals().update({key: value for key, value in locals().items() if key in __all__})
    return globals()[name]
