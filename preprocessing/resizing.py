"""The resizing of pictures to a model's input, on a CPU."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image


def resize(pixels: np.ndarray, size: int, antialias: bool, out: np.ndarray | None = None) -> np.ndarray:
    """Pixels (H, W, 3) uint8 to (size, size, 3), bicubically; perhaps in `out`, where that is given.

    Pillow's kernel is that of PyTorch's antialiased bicubic, OpenCV's that of the plain one.
    """
    if antialias:
        return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
    return cv2.resize(pixels, (size, size), dst=out, interpolation=cv2.INTER_CUBIC)
