"""From shards to batches: the epoch plan, storage, clip sampling, decoding."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loaders.augment import AUGMENTATIONS
    from loaders.batch import Answers, Batch, normalize
    from loaders.config import LoaderConfig, PerMedia, VideoInput
    from loaders.order.frames import FRAME_SAMPLERS
    from loaders.text import Tokenizer
    from loaders.train import TrainLoader

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
    from loaders.batch import Answers, Batch, normalize  # noqa: F401
    from loaders.config import LoaderConfig, PerMedia, VideoInput  # noqa: F401
    from loaders.order.frames import FRAME_SAMPLERS  # noqa: F401
    from loaders.text import Tokenizer  # noqa: F401
    from loaders.train import TrainLoader  # noqa: F401

    globals().update({key: value for key, value in locals().items() if key in __all__})
    return globals()[name]
