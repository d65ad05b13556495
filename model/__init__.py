"""The Singularity model: vision, text, fusion and temporal encoders and their losses."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.api import Singularity, SingularityQA

__all__ = ["Singularity", "SingularityQA"]


def __getattr__(name: str) -> object:
    """A public name, imported when it is first used: settings are read without PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module 'model' has no attribute {name!r}")
    from model.api import Singularity, SingularityQA  # noqa: F401

    globals().update({key: value for key, value in locals().items() if key in __all__})
    return globals()[name]
