"""Media files to the JPEG frames that are stored."""

from sharding.media.frames import Frames, MediaError
from sharding.media.image import pack_image
from sharding.media.video import pack_video

__all__ = ["Frames", "MediaError", "pack_image", "pack_video"]
