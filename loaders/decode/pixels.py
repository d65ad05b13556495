"""From JPEG bytes to the window that is shown, on a CPU: libjpeg-turbo, and OpenCV's bicubic."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from loaders.order.choices import BadSampleError, Window
from sharding.media.frames import MediaError
from sharding.media.jpeg import SIDEWAYS, START_OF_IMAGE, has_end, is_plain_jpeg
from sharding.media.picture import decode_picture, picture_size

cv2.setNumThreads(0)  # pictures are decoded side by side; threads within one only get in the way


# With antialiasing a JPEG much larger than what is shown is decoded at half, a quarter or an eighth. The window is then
# still this many times what is shown: on photos 0.4 grey levels of 255 from decoding whole, and 2x as fast at 1,024
# pixels; at 1 instead of 2 it would be 0.9 to 1.6 (docs/streaming.md). Without antialiasing the picture would change.
SPARE = 2
EVEN_SUBSAMPLINGS = {"444", "420", "Gray"}  # libjpeg reduces colours of the others unlike their brightness


class Clip(NamedTuple):
    """What is to be decoded: T frames' bytes, their size in the index, and the part to show."""

    jpegs: list[bytes]
    height: int
    width: int
    window: Window


class Frame(NamedTuple):
    """A decoded frame, upright, and the part of it to show."""

    pixels: np.ndarray  # RGB (H, W, 3), or (H / fraction, W / fraction, 3), rounded up
    window: Window  # in pixels of the whole frame
    fraction: int = 1


class Scratch:
    """Memory for pixels on their way, used again: fresh pages cost as much as decoding. For one thread."""

    def __init__(self) -> None:
        self._rooms: dict[int, np.ndarray] = {}

    def room(self, number: int, size: int) -> np.ndarray:
        """Room `number`, of `size` bytes or more."""
        if number not in self._rooms or self._rooms[number].size < size:
            self._rooms[number] = odd_room(size)
        return self._rooms[number]


def odd_room(size: int) -> np.ndarray:
    """So many bytes at an odd address.

    libjpeg-turbo writes rows that begin at a multiple of 32 past the caches, and whoever reads them then waits for the
    memory: up to a quarter of a photo's time where a row's bytes are a multiple of 16 (benchmarks/RESULTS.md).
    """
    memory = np.empty(size + 32, np.uint8)
    first = (1 - memory.ctypes.data) % 32
    return memory[first : first + size]


def decode_clip(clip: Clip, out: np.ndarray, antialias: bool, scratch: Scratch) -> None:
    """Write a clip's frames into `out` (T, S, S, 3) uint8; raises BadSampleError naming the frame that fails."""
    size = out.shape[1]
    as_it_is = clip.height == clip.width == size and clip.window == (0, 0, size, size, False)
    room = None if as_it_is else scratch.room(0, clip.height * clip.width * 3)
    for number, data in enumerate(clip.jpegs):
        if number and data is clip.jpegs[number - 1]:  # a repeated frame is decoded once
            out[number] = out[number - 1]
            continue
        try:
            frame = decode_frame(data, clip, out[number] if room is None else room, size if antialias else None)
        except BadSampleError as error:
            raise BadSampleError(f"frame {number} of those shown: {error}") from None
        if room is not None or not np.may_share_memory(frame.pixels, out):  # else it was decoded into its place
            if frame.fraction > 1:
                show_fraction(frame.pixels, frame.window, out[number], frame.fraction)
            else:
                show(frame.pixels, frame.window, out[number], antialias, scratch.room(1, size * size * 3))


def jpeg_fraction(data: bytes, clip: Clip, size: int) -> int:
    """The n of the fraction 1/n, 1 to 8, at which a JPEG is decoded: its window is still SPARE times what is shown."""
    least = min(clip.window.height, clip.window.width)
    fraction = max(n for n in (1, 2, 4, 8) if n == 1 or least >= SPARE * n * size)
    if fraction == 1 or data[:2] != START_OF_IMAGE:
        return 1
    try:
        height, width, _, subsampling = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # decoding says what is wrong with it
        return 1
    return fraction if (height, width) == (clip.height, clip.width) and subsampling in EVEN_SUBSAMPLINGS else 1


def decode_frame(data: bytes, clip: Clip, room: np.ndarray, size: int | None) -> Frame:
    """The pixels of one of a clip's frames, in `room` where they are a plain JPEG's.

    size: what is shown of it, where it may be decoded at a fraction of its own; None: never.

    Raises:
        BadSampleError: it does not decode, or has not the size in the index.
    """
    if not is_plain_jpeg(data):
        return decode_other(data, clip)
    fraction = 1 if size is None else jpeg_fraction(data, clip, size)
    height, width = -(-clip.height // fraction), -(-clip.width // fraction)
    least = {"min_height": height, "min_width": width} if fraction > 1 else {}
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, buffer=room, **least)
    except ValueError as error:  # damaged, of another size, or sound and of a kind that only Pillow decodes
        return decode_other(data, clip, str(error))
    if pixels.shape[:2] != (height, width):
        raise BadSampleError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels, the index says {clip.width}x{clip.height}")
    return Frame(pixels, clip.window, fraction)


def decode_other(data: bytes, clip: Clip, warning: str = "") -> Frame:
    """An image that is no plain JPEG, as packing would store it: foreign shards hold PNG, WebP, turned photos.

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
    raise BadSampleError(f"{width}x{height} pixels, the index says {clip.width}x{clip.height}")


def header_fault(data: bytes, clip: Clip) -> str | None:
    """What the header of a plain image already tells against it, by some bytes of it; None when nothing."""
    try:
        width, height = picture_size(data)
    except MediaError as error:
        return str(error)
    if (height, width) != (clip.height, clip.width):
        return f"{width}x{height} pixels, the index says {clip.width}x{clip.height}"
    if data[:2] == START_OF_IMAGE and not has_end(data):
        return f"broken image: {len(data)} bytes of a JPEG that is cut short: it has no end-of-image marker"
    return None


def show(pixels: np.ndarray, window: Window, out: np.ndarray, antialias: bool, room: np.ndarray) -> None:
    """Write a picture's window into `out` (S, S, 3), resized bicubically, mirrored if it says so; room: S*S*3 bytes."""
    top, left, height, width, flip = window
    size = out.shape[0]
    crop = pixels[top : top + height, left : left + width]
    if (height, width) != (size, size):
        target = room[: out.size].reshape(out.shape) if flip else out
        if antialias:  # Pillow's kernel is that of PyTorch's antialiased bicubic, OpenCV's that of the plain one
            crop = np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BICUBIC))
        else:
            crop = cv2.resize(crop, (size, size), dst=target, interpolation=cv2.INTER_CUBIC)
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
