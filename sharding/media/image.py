"""Image files to the JPEG that is stored: decode once, shrink the shorter side, encode."""

from __future__ import annotations

import io
import math
import warnings

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from sharding.media.frames import Frames, MediaError, encode, stored_size

EXIF_ORIENTATION = 0x0112
DETAIL, HALVED = 2.0, 1.5  # times the stored size: a JPEG is decoded no smaller, at one half of its own no smaller
SHARP, SOFT = 1.25, 2.6  # scales up to which bicubic alone, and bicubic after a slight blur, come nearest to Lanczos


def pack_image(data: bytes, size: int, quality: int) -> Frames:
    """An image file's stored form, its shorter side at most `size` pixels.

    A plain JPEG (three channels, upright) that is small enough keeps its bytes.

    Raises:
        MediaError: the bytes are no complete image.
    """
    if not data:
        raise MediaError("empty file")
    plain = plain_jpeg_size(data)
    if plain and min(plain) <= size:
        decode_jpeg(data, 1)  # a truncated file must not pass through
        return Frames([data], *plain)
    pixels = decode_jpeg(data, least_decoded(min(plain), size)) if plain else decode_any(data)
    width, height = plain or (pixels.shape[1], pixels.shape[0])  # decoding at a fraction has rounded the pixels' own
    pixels = shrink(pixels, *stored_size(width, height, size))
    return Frames([encode(pixels, quality)], pixels.shape[1], pixels.shape[0])


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of an upright colour JPEG; None for anything that needs conversion."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        return (width, height) if colours in ("YCbCr", "RGB") and is_upright(data) else None
    except (OSError, SyntaxError, ValueError) as error:
        raise MediaError(f"unreadable image: {error}") from None


def is_upright(data: bytes) -> bool:
    """Whether a JPEG is shown as it is stored; Pillow, slower than all else here, looks only where it must."""
    if b"Exif\x00\x00" not in data:
        return True
    with Image.open(io.BytesIO(data)) as image:
        return image.getexif().get(EXIF_ORIENTATION, 1) == 1


def least_decoded(shorter: int, size: int) -> int:
    """Pixels of the shorter side that are decoded at least, so that no detail of the stored size is lost.

    Decoding at a half is sharper, for its size, and cheaper than at the fractions below it.
    """
    return round((HALVED if shorter < 2 * DETAIL * size else DETAIL) * size)


def decode_jpeg(data: bytes, size: int) -> np.ndarray:
    """RGB pixels (H, W, 3) of a JPEG, scaled down in the DCT to a half or less, but to no less than `size` pixels.

    Fractions above a half cost more than the whole. 0: in full.
    """
    if not data.rstrip(b"\x00").endswith(b"\xff\xd9") and b"\xff\xd9" not in data[-4096:]:
        raise MediaError("truncated JPEG")
    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_height=size, min_width=size, min_factor=2, fastdct=False)
    except ValueError as error:
        raise MediaError(f"broken JPEG: {error}") from None


def decode_any(data: bytes) -> np.ndarray:
    """RGB pixels (H, W, 3) of any image Pillow reads: upright, first frame, transparency over white, 16 bits to 8."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as file:
                file.load()
                image: Image.Image = ImageOps.exif_transpose(file)
                if image.mode.startswith("I"):
                    image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
                if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
                    image = image.convert("RGBA")
                    white = Image.new("RGBA", image.size, "white")
                    image = Image.alpha_composite(white, image)
                return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"unreadable image: {str(error).split(' <')[0]}") from None


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
