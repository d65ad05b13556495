"""The Singularity model: vision, text, fusion and temporal encoders and their losses."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.api import Singularity, SingularityQA
    from model.building import build_model
    from model.config import ModelConfig

__all__ = [
    "ModelConfig",
    "Singularity",
    "SingularityQA",
    "build_model",
]


def __getattr__(name: str) -> object:
    """A public name, imported when it is first used: settings are read without PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module 'model' has no attribute {name!r}")
    from model.api import Singularity, SingularityQA  # noqa: F401
    from model.building import build_model  # noqa: F401
    from model.config import ModelConfig  # noqa: F401

    globals().update({key: value for key, value in locals().items() if key in __all__})
    return globals()[name]
