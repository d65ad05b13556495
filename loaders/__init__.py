"""From shards to batches: the epoch plan, storage, clip sampling, decoding."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loaders.augment import AUGMENTATIONS
    from loaders.batch import Answers, Batch
    from loaders.config import LoaderConfig, PerMedia, VideoInput
    from loaders.train import TrainLoader
    from preprocessing.frames import FRAME_SAMPLERS
    from preprocessing.normalization import normalize
    from preprocessing.text import Tokenizer

__all__ = [
    "AUGMENTATIONS",
    "FRAME_SAMPLERS",
    "Answers",
    "Batch",
    "LoaderConfig",
    "PerMedia",
    "Tokenizer",
    "TrainLoader",
    "VideoInput",
    "normalize",
]


def __getattr__(name: str) -> object:
    """A public name, imported when it is first used: the decoding processes start faster without PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module 'loaders' has no attribute {name!r}")
    from loaders.augment import AUGMENTATIONS  # noqa: F401
    from loaders.batch import Answers, Batch  # noqa: F401
    from loaders.config import LoaderConfig, PerMedia, VideoInput  # noqa: F401
    from loaders.train import TrainLoader  # noqa: F401
    from preprocessing.frames import FRAME_SAMPLERS  # noqa: F401
    from preprocessing.normalization import normalize  # noqa: F401
    from preprocessing.text import Tokenizer  # noqa: F401

    globals().update({key: value for key, value in locals().items() if key in __all__})
    return globals()[name]
