"""Image files to the JPEG that is stored: decode once, shrink the shorter side, encode."""

from __future__ import annotations

import math

import cv2
import numpy as np

from sharding.media.frames import Frames, encode, stored_size
from sharding.media.picture import decode_picture

SHARP, SOFT = 1.25, 2.6  # scales up to which bicubic alone, and bicubic after a slight blur, come nearest to Lanczos


def pack_image(data: bytes, size: int, quality: int) -> Frames:
    """An image file's stored form, its shorter side at most `size` pixels.

    A plain JPEG (three channels, upright) that is small enough keeps its bytes.

    Raises MediaError: see `decode_picture`.
    """
    picture = decode_picture(data, size)
    if picture.is_plain and min(picture.width, picture.height) <= size:
        return Frames([data], picture.width, picture.height)
    pixels = shrink(picture.pixels, *stored_size(picture.width, picture.height, size))
    return Frames([encode(pixels, quality)], pixels.shape[1], pixels.shape[0])


def shrink(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """The picture (H, W, 3) with fewer pixels, or as it is.

    The filters are OpenCV's fastest that are no further from Lanczos than its area filter, whose cost is several times
    as high at all scales but whole ones.
    """
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels)
    scale = min(pixels.shape[:2]) / min(height, width)
    if scale > SOFT:
        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    if scale > SHARP:
        pixels = cv2.GaussianBlur(pixels, (3, 3), 0.42 * math.sqrt(scale**2 - 1), borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC)
