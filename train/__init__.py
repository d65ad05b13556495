"""Training on DeepSpeed: configuration, engine, loop, checkpoints, tracking."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.config.settings import RunConfig, Settings, load_settings

__all__ = [
    "RunConfig",
    "Settings",
    "load_settings",
]


def __getattr__(name: str) -> object:
    """A public name, imported when it is first used: commands start faster without the others."""
    if name not in __all__:
        raise AttributeError(f"module 'train' has no attribute {name!r}")
    from train.config.settings import RunConfig, Settings, load_settings  # noqa: F401

    globals().update({key: value for key, value in locals().items() if key in __all__})
    return globals()[name]
