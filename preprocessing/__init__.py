"""What a model reads: texts to token ids, pictures and clips to pixels; training, evaluation and Python alike."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from preprocessing.config import Preprocessing, TrainingCorpus
    from preprocessing.frames import FRAME_SAMPLERS, choose_frames
    from preprocessing.normalization import normalize
    from preprocessing.text import Tokenizer, clean_text

__all__ = [
    "FRAME_SAMPLERS",
    "Preprocessing",
    "Tokenizer",
    "TrainingCorpus",
    "choose_frames",
    "clean_text",
    "normalize",
]


def __getattr__(name: str) -> object:
    """A public name, imported when it is first used: decoding processes start faster without PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module 'preprocessing' has no attribute {name!r}")
    from preprocessing.config import Preprocessing, TrainingCorpus  # noqa: F401
    from preprocessing.frames import FRAME_SAMPLERS, choose_frames  # noqa: F401
    from preprocessing.normalization import normalize  # noqa: F401
    from preprocessing.text import Tokenizer, clean_text  # noqa: F401

    globals().update({key: value for key, value in locals().items() if key in __all__})
    return globals()[name]
