"""Video files to the JPEG frames that are stored: chosen by time stamp, shrunk, encoded."""

from __future__ import annotations

import math
import mmap

import av
import cv2

from sharding.media.clip import Clip, open_container
from sharding.media.frames import Frames, MediaError, encode

LONGEST_STILL = 24 * 3600  # seconds that a frame may stay on screen; beyond that a time stamp is damaged


def pack_video(
    data: bytes | mmap.mmap,
    size: int,
    quality: int,
    fps: float,
    max_frames: int = 0,
    start: float = 0.0,
    end: float = math.inf,
) -> Frames:
    """A clip's stored form: the frames on screen 0, 1/fps, 2/fps ... seconds after `start`, before `end`.

    Frames are chosen by time stamp, so variable frame rates keep their timing; seconds count from the first frame.
    `max_frames` 0: no limit; what lies behind the last frame wanted is not decoded.

    Raises:
        MediaError: the bytes have no video, or less than half of what the file promises decodes.
    """
    if not len(data):
        raise MediaError("empty file")
    try:
        with open_container(data) as container:
            clip = Clip(container)
            frames = sample_clip(clip, size, quality, fps, max_frames, start, end)
            check_complete(clip, end)
            return frames
    except (av.FFmpegError, ValueError, OverflowError, MemoryError) as error:
        raise MediaError(f"unreadable video: {getattr(error, 'strerror', None) or error}") from None


def sample_clip(clip: Clip, size: int, quality: int, fps: float, max_frames: int, start: float, end: float) -> Frames:
    """The stored frames of an open clip; raises MediaError when there is none."""
    jpegs: list[bytes] = []
    times: list[float] = []
    shape = (0, 0)
    last = 0.0
    for frame, until in clip.shown(start):
        last = min(until, end) - start
        wanted = 0
        while (len(times) + wanted) / fps < last - 1e-6 and not (max_frames and len(times) + wanted >= max_frames):
            wanted += 1
            if wanted > 1 + LONGEST_STILL * fps:
                raise MediaError("unreadable video: by its time stamps one frame is shown for more than a day")
        if wanted:
            pixels = clip.picture(frame, size)
            if jpegs and pixels.shape[:2] != shape:  # some streams change their size on the way
                pixels = cv2.resize(pixels, shape[::-1], interpolation=cv2.INTER_AREA)
            shape = pixels.shape[:2]
            times += [(len(times) + number) / fps for number in range(wanted)]
            jpegs += [encode(pixels, quality)] * wanted
        if until >= end or (max_frames and len(times) >= max_frames):
            last = (end if until >= end else min(max(clip.length(end), until), end)) - start
            break
    if not jpegs:
        raise MediaError("no frame can be decoded" if start <= 0 else f"no frame at {start:g} seconds or later")
    return Frames(jpegs, shape[1], shape[0], fps, last, tuple(times))


def check_complete(clip: Clip, end: float) -> None:
    """Refuse a clip of which damage left less than half."""
    promised = min(clip.promised, end)
    if clip.broken and clip.reached < promised / 2:
        raise MediaError(f"damaged video: only a part decodes ({clip.broken})")
