"""The stored form of an image or a clip: JPEG frames with a maximum shorter side."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import simplejpeg

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # of an object, in an error's text


class MediaError(Exception):
    """A media file that cannot be packed; the message is the reason that the report shows, the same in every run."""

    def __init__(self, reason: str) -> None:
        super().__init__(ADDRESS.sub("", reason))


@dataclass(frozen=True)
class Frames:
    """The stored form of one image or clip: JPEG bytes, pixels, and for clips rate, seconds and times."""

    jpegs: list[bytes]
    width: int
    height: int
    fps: float | None = None
    duration: float | None = None
    times: tuple[float, ...] = ()


def stored_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the shorter of both at most `size`, aspect kept."""
    scale = min(1.0, size / min(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def encode(pixels: np.ndarray, quality: int) -> bytes:
    """JPEG bytes of RGB pixels."""
    return simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="420")
