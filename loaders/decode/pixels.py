"""Decodes the bytes of a clip to the cropped window on a CPU: libjpeg-turbo, OpenCV's bicubic."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from loaders.samples import BadSampleError, Clip, Window
from preprocessing.resizing import resize
from sharding.media.frames import MediaError
from sharding.media.jpeg import SIDEWAYS, START_OF_IMAGE, has_end, is_plain_jpeg
from sharding.media.picture import decode_picture, picture_size

cv2.setNumThreads(0)  # pictures are decoded in parallel; threads within one would compete with them

# With antialiasing, a JPEG much larger than what is shown is decoded at 1/2, 1/4 or 1/8 of its size, if its window is
# then still this many times what is shown. Photos differ by 0.4 grey levels of 255 from decoding whole, and decode
# 2x as fast at 1,024 pixels; with 1 instead of 2 they would differ by 0.9 to 1.6 (docs/streaming.md).
OVERSAMPLING = 2
EVEN_SUBSAMPLINGS = {"444", "420", "Gray"}  # of the others libjpeg reduces colours in another way than brightness


class Frame(NamedTuple):
    """A decoded frame, upright, and the part of it to show."""

    pixels: np.ndarray  # RGB (H, W, 3), or (H / fraction, W / fraction, 3), rounded up
    window: Window  # in pixels of the whole frame
    fraction: int = 1


class Scratch:
    """Reused memory for pixels: fresh pages cost as much as decoding. For one thread."""

    def __init__(self) -> None:
        self._buffers: dict[int, np.ndarray] = {}

    def buffer(self, number: int, size: int) -> np.ndarray:
        """Buffer `number`, of `size` bytes or more."""
        if number not in self._buffers or self._buffers[number].size < size:
            self._buffers[number] = odd_buffer(size)
        return self._buffers[number]


def odd_buffer(size: int) -> np.ndarray:
    """A buffer of `size` bytes at an odd address.

    libjpeg-turbo writes rows that begin at a multiple of 32 around the caches, and reading them then waits for memory:
    up to 25 % of a photo's time where a row's bytes are a multiple of 16 (benchmarks/RESULTS.md).
    """
    memory = np.empty(size + 32, np.uint8)
    first = (1 - memory.ctypes.data) % 32
    return memory[first : first + size]


def decode_clip(clip: Clip, out: np.ndarray, antialias: bool, scratch: Scratch) -> None:
    """Write a clip's frames into `out` (T, S, S, 3) uint8; raises BadSampleError with the frame that fails."""
    size = out.shape[1]
    unchanged = clip.height == clip.width == size and clip.window == (0, 0, size, size, False)
    buffer = None if unchanged else scratch.buffer(0, clip.height * clip.width * 3)
    for number, data in enumerate(clip.jpegs):
        if number and data is clip.jpegs[number - 1]:  # a repeated frame is decoded once
            out[number] = out[number - 1]
            continue
        try:
            frame = decode_frame(data, clip, out[number] if buffer is None else buffer, size if antialias else None)
        except BadSampleError as error:
            raise BadSampleError(f"frame {number}: {error}") from None
        if buffer is not None or not np.may_share_memory(frame.pixels, out):  # else it was decoded into its place
            if frame.fraction > 1:
                show_fraction(frame.pixels, frame.window, out[number], frame.fraction)
            else:
                show(frame.pixels, frame.window, out[number], antialias, scratch.buffer(1, size * size * 3))


def jpeg_fraction(data: bytes, clip: Clip, size: int) -> int:
    """The n, 1 to 8, for which a JPEG is decoded at 1/n of its size; see OVERSAMPLING."""
    least = min(clip.window.height, clip.window.width)
    fraction = max(n for n in (1, 2, 4, 8) if n == 1 or least >= OVERSAMPLING * n * size)
    if fraction == 1 or data[:2] != START_OF_IMAGE:
        return 1
    try:
        height, width, _, subsampling = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # decoding reports the fault
        return 1
    return fraction if (height, width) == (clip.height, clip.width) and subsampling in EVEN_SUBSAMPLINGS else 1


def decode_frame(data: bytes, clip: Clip, buffer: np.ndarray, size: int | None) -> Frame:
    """The pixels of one of a clip's frames, in `buffer` where they are a plain JPEG's.

    size: what is shown of it, where it may be decoded at a fraction of its own; None: never.
    Raises BadSampleError: it does not decode, or has not the size in the index.
    """
    if not is_plain_jpeg(data):
        return decode_other(data, clip)
    fraction = 1 if size is None else jpeg_fraction(data, clip, size)
    height, width = -(-clip.height // fraction), -(-clip.width // fraction)
    least = {"min_height": height, "min_width": width} if fraction > 1 else {}
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, buffer=buffer, **least)
    except ValueError as error:  # damaged, of another size, or of a kind that only Pillow decodes
        return decode_other(data, clip, str(error))
    if pixels.shape[:2] != (height, width):
        raise BadSampleError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels, the index has {clip.width}x{clip.height}")
    return Frame(pixels, clip.window, fraction)


def decode_other(data: bytes, clip: Clip, warning: str = "") -> Frame:
    """An image that is not a plain JPEG, as packing would store it: foreign shards hold PNG, WebP, turned photos.

    warning: what libjpeg-turbo said of it; the reason where packing refuses it as well.
    """
    try:
        pixels, width, height, *_, orientation = decode_picture(data)
    except MediaError as error:
        raise BadSampleError(f"broken image: {warning or error}") from None
    if (height, width) == (clip.height, clip.width):
        return Frame(pixels, clip.window)
    if (width, height) == (clip.height, clip.width) and orientation in SIDEWAYS:
        top, left, window_height, window_width, flip = clip.window  # of an index with the size before turning
        return Frame(pixels, Window(left, top, window_width, window_height, flip))
    raise BadSampleError(f"{width}x{height} pixels, the index has {clip.width}x{clip.height}")


def header_fault(data: bytes, clip: Clip) -> str | None:
    """The reason why an image cannot be decoded, from its header and last bytes; None if they are intact."""
    try:
        width, height = picture_size(data)
    except MediaError as error:
        return str(error)
    if (height, width) != (clip.height, clip.width):
        return f"{width}x{height} pixels, the index has {clip.width}x{clip.height}"
    if data[:2] == START_OF_IMAGE and not has_end(data):
        return f"broken image: {len(data)} bytes of a truncated JPEG without an end-of-image marker"
    return None


def show(pixels: np.ndarray, window: Window, out: np.ndarray, antialias: bool, buffer: np.ndarray) -> None:
    """Write a window into `out` (S, S, 3): resized bicubically, and flipped if requested. buffer: S*S*3 bytes."""
    top, left, height, width, flip = window
    size = out.shape[0]
    crop = pixels[top : top + height, left : left + width]
    if (height, width) != (size, size):
        target = buffer[: out.size].reshape(out.shape) if flip else out
        crop = resize(crop, size, antialias, target)
    if flip:
        cv2.flip(crop, 1, dst=out)
    elif crop is not out:
        np.copyto(out, crop)


def show_fraction(pixels: np.ndarray, window: Window, out: np.ndarray, fraction: int) -> None:
    """Write a window of a picture that was decoded at 1/fraction into `out` (S, S, 3), with antialiasing."""
    top, left, height, width, flip = window
    first_row, first_column = top // fraction, left // fraction
    end_row, end_column = -(-(top + height) // fraction), -(-(left + width) // fraction)
    box = (
        left / fraction - first_column,
        top / fraction - first_row,
        (left + width) / fraction - first_column,
        (top + height) / fraction - first_row,
    )
    crop = Image.fromarray(pixels[first_row:end_row, first_column:end_column])
    shown = np.asarray(crop.resize(out.shape[:2], Image.Resampling.BICUBIC, box=box))
    np.copyto(out, shown[:, ::-1] if flip else shown)
