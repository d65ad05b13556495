"""From annotations and media files to webdataset shards with their indices."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sharding.build import build_corpus
    from sharding.shards.schema import Corpus, read_corpus, read_index

__all__ = [
    "Corpus",
    "build_corpus",
    "read_corpus",
    "read_index",
]


def __getattr__(name: str) -> object:
    """A public name, imported when it is first used: commands start faster without the others."""
    if name not in __all__:
        raise AttributeError(f"module 'sharding' has no attribute {name!r}")
    from sharding.build import build_corpus  # noqa: F401
    from sharding.shards.schema import Corpus, read_corpus, read_index  # noqa: F401

    globals().update({key: value for key, value in locals().items() if key in __all__})
    return globals()[name]
