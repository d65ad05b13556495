"""Media files to the JPEG frames that are stored: decode once, shrink the shorter side, encode."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import av
import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

EXIF_ORIENTATION = 0x0112


class MediaError(Exception):
    """A media file that cannot be packed; the message is the reason that the report shows."""


@dataclass(frozen=True)
class Frames:
    """The stored form of one image or clip: JPEG bytes, pixels, and for clips rate, seconds and times."""

    jpegs: list[bytes]
    width: int
    height: int
    fps: float | None = None
    duration: float | None = None
    times: tuple[float, ...] = ()


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
        decode_jpeg(data, 0)  # a truncated file must not pass through
        return Frames([data], *plain)
    pixels = decode_jpeg(data, size) if plain else decode_any(data)
    pixels = shrink(pixels, size)
    return Frames([encode(pixels, quality)], pixels.shape[1], pixels.shape[0])


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of an upright colour JPEG; None for anything that needs conversion."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:
            upright = image.getexif().get(EXIF_ORIENTATION, 1) == 1
            return image.size if image.mode == "RGB" and upright else None
    except (OSError, SyntaxError, ValueError) as error:
        raise MediaError(f"unreadable image: {error}") from None


def decode_jpeg(data: bytes, size: int) -> np.ndarray:
    """RGB pixels (H, W, 3) of a JPEG, already scaled down in the DCT to no less than `size` pixels (0: in full)."""
    if not data.rstrip(b"\x00").endswith(b"\xff\xd9") and b"\xff\xd9" not in data[-4096:]:
        raise MediaError("truncated JPEG")
    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_height=size, min_width=size, fastdct=False)
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


def shrink(pixels: np.ndarray, size: int) -> np.ndarray:
    """The picture with its shorter side at most `size` pixels, aspect kept."""
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    if shorter <= size:
        return np.ascontiguousarray(pixels)
    target = (max(1, round(width * size / shorter)), max(1, round(height * size / shorter)))
    return cv2.resize(pixels, target, interpolation=cv2.INTER_AREA)


def encode(pixels: np.ndarray, quality: int) -> bytes:
    """JPEG bytes of RGB pixels."""
    return simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="420")


def pack_video(data: bytes, size: int, quality: int, fps: float, max_frames: int) -> Frames:
    """A clip's stored form: the frames on screen 0, 1/fps, 2/fps ... seconds after its first frame.

    Frames are chosen by time stamp, so variable frame rates keep their timing. `max_frames` 0: no limit.

    Raises:
        MediaError: the bytes hold no video, or not one frame decodes.
    """
    if not data:
        raise MediaError("empty file")
    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            if not container.streams.video:
                raise MediaError("no video stream")
            return sample_clip(container, size, quality, fps, max_frames)
    except (av.FFmpegError, ValueError) as error:
        raise MediaError(f"unreadable video: {error}") from None


def sample_clip(container: av.container.InputContainer, size: int, quality: int, fps: float, max_frames: int) -> Frames:
    """The stored frames of an open container; what decodes before a broken packet is kept."""
    jpegs: list[bytes] = []
    shape = (0, 0)
    end = 0.0
    for frame, begin, end in shown_frames(container):
        wanted = 0
        while (len(jpegs) + wanted) / fps < end - 1e-6 and (not max_frames or len(jpegs) + wanted < max_frames):
            wanted += 1
        if wanted or not jpegs:
            pixels = shrink(picture(frame), size)
            shape = pixels.shape[:2]
            jpegs += [encode(pixels, quality)] * max(wanted, 1)
        if max_frames and len(jpegs) >= max_frames and begin > 0:
            continue  # the rest is read for the clip's duration only
    if not jpegs:
        raise MediaError("no frame decodes")
    return Frames(jpegs, shape[1], shape[0], fps, end, tuple(index / fps for index in range(len(jpegs))))


def shown_frames(container: av.container.InputContainer) -> Iterator[tuple[av.VideoFrame, float, float]]:
    """(frame, first second, last second) of a clip's frames, in order; seconds count from the first frame."""
    stream = container.streams.video[0]
    stream.thread_type = "NONE"
    step = 1.0 / float(stream.average_rate or stream.guessed_rate or 25)
    held: av.VideoFrame | None = None
    first = begin = 0.0
    unit = float(stream.time_base or 0)
    try:
        for frame in container.decode(stream):
            now = frame.pts * unit if frame.pts is not None and unit else begin + first + step
            if held is None:
                first = now
                begin = 0.0
            elif now - first > begin:
                yield held, begin, now - first
                begin = now - first
            held = frame
    except av.FFmpegError:
        pass  # a broken packet ends the clip; frames before it count
    if held is not None:
        yield held, begin, begin + step


def picture(frame: av.VideoFrame) -> np.ndarray:
    """RGB pixels (H, W, 3) of a decoded frame, upright."""
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns))
