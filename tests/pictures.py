"""A small picture with detail, its files, and how EXIF's orientations turn it."""

import io
from typing import Any

import cv2
import numpy as np
from PIL import Image

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def photo(height: int = 48, width: int = 64) -> Image.Image:
    """Something with detail, whose corners differ."""
    noise = np.random.default_rng(5).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC))


def saved(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    """A picture's file; JPEGs of quality 90, unless the options say otherwise."""
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": 90} if form == "JPEG" else {}) | options)
    return buffer.getvalue()
