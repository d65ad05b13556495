"""A small picture with detail, its encoded files, and the rotations of EXIF's orientations."""

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
    """A picture with detail and four different corners."""
    noise = np.random.default_rng(5).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC))


def saved(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    """A picture encoded; JPEGs of quality 90 by default."""
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": 90} if form == "JPEG" else {}) | options)
    return buffer.getvalue()
