"""Media files to the JPEG frames that are stored."""

from typing import TYPE_CHECKING, Any

from sharding.media.frames import Frames, MediaError
from sharding.media.image import pack_image

if TYPE_CHECKING:
    from sharding.media.video import pack_video

__all__ = ["Frames", "MediaError", "pack_image", "pack_video"]


def __getattr__(name: str) -> Any:
    """`pack_video` when it is asked for: the loader decodes pictures only, and PyAV takes memory and time."""
    if name == "pack_video":
        from sharding.media.video import pack_video

        return pack_video
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
