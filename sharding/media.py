"""Media files to the JPEG frames that are stored: decode once, shrink the shorter side, encode."""

from __future__ import annotations

import io
import itertools
import math
import mmap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import av
import cv2
import numpy as np
import simplejpeg
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

EXIF_ORIENTATION = 0x0112
DETAIL, HALVED = 2.0, 1.5  # times the stored size: a JPEG is decoded no smaller, at one half of its own no smaller
SHARP, SOFT = 1.25, 2.6  # scales up to which bicubic alone, and bicubic after a slight blur, come nearest to Lanczos
SEEK_BEYOND = 5.0  # seconds; to a start that is nearer a clip is decoded from its beginning


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


def stored_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the shorter of both at most `size`, aspect kept."""
    scale = min(1.0, size / min(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def encode(pixels: np.ndarray, quality: int) -> bytes:
    """JPEG bytes of RGB pixels."""
    return simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="420")


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
        MediaError: the bytes hold no video, or less than half of what the file promises decodes.
    """
    if not len(data):
        raise MediaError("empty file")
    try:
        source = data if isinstance(data, mmap.mmap) else io.BytesIO(data)
        with av.open(source, mode="r", metadata_errors="replace") as container:
            if not container.streams.video:
                raise MediaError("no video stream")
            clip = Clip(container)
            frames = sample_clip(clip, size, quality, fps, max_frames, start, end)
            check_complete(clip, end)
            return frames
    except (av.FFmpegError, ValueError) as error:
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
        if wanted:
            pixels = clip.picture(frame, size)
            if jpegs and pixels.shape[:2] != shape:  # some streams change their size on the way
                pixels = cv2.resize(pixels, shape[::-1], interpolation=cv2.INTER_AREA)
            shape = pixels.shape[:2]
            times += [(len(times) + number) / fps for number in range(wanted)]
            jpegs += [encode(pixels, quality)] * wanted
        if until >= end or (max_frames and len(times) >= max_frames):
            last = min(max(clip.promised, until), end) - start
            break
    if not jpegs:
        raise MediaError("no frame decodes" if start <= 0 else f"no frame at {start:g} seconds or later")
    return Frames(jpegs, shape[1], shape[0], fps, last, tuple(times))


def check_complete(clip: Clip, end: float) -> None:
    """Refuse a clip of which damage left less than half."""
    promised = min(clip.promised, end)
    if clip.broken and clip.reached < promised / 2:
        raise MediaError(f"damaged video: only a part decodes ({clip.broken})")


class Clip:
    """An open video: its frames with the seconds they are shown until, past broken packets."""

    def __init__(self, container: av.container.InputContainer) -> None:
        self.container = container
        self.stream = container.streams.video[0]
        self.stream.thread_type = "NONE"  # processes decode side by side, one clip each
        self.unit = float(self.stream.time_base or 0)
        self.step = 1.0 / float(self.stream.average_rate or self.stream.guessed_rate or 25)
        self.reformatter = VideoReformatter()
        self.broken = ""  # the decoder's complaint about the first broken packet
        self.reached = 0.0  # seconds decoded

    @property
    def promised(self) -> float:
        """Seconds that the header says the clip lasts; 0 when it says nothing."""
        if self.stream.duration and self.unit:
            return float(self.stream.duration * self.unit)
        return (self.container.duration or 0) / av.time_base

    def shown(self, start: float = 0.0) -> Iterator[tuple[av.VideoFrame, float]]:
        """(frame, second until it is shown) in order of time, of frames shown later than `start`."""
        frames = self.decoded()
        held = next(frames, None)
        if held is None:
            return
        origin = self.time_of(held, 0.0)
        begin = 0.0
        if start > SEEK_BEYOND:
            frames = self.decoded_from(origin + start)
        for frame in frames:
            now = self.time_of(frame, origin + begin + self.step) - origin
            if now > begin:
                begin, held, before = now, frame, held
                if begin > start:
                    yield before, begin
            self.reached = begin
        self.reached = begin + self.step
        if self.reached > start:
            yield held, self.reached

    def time_of(self, frame: av.VideoFrame, otherwise: float) -> float:
        """A frame's time stamp in seconds."""
        return frame.pts * self.unit if frame.pts is not None and self.unit else otherwise

    def decoded_from(self, seconds: float) -> Iterator[av.VideoFrame]:
        """Frames from a key frame before a time stamp on; all of them where the container cannot seek well."""
        self.container.seek(int(seconds / self.unit), stream=self.stream)
        frames = (frame for frame in self.decoded() if frame.pts is not None)
        first = next(frames, None)
        if first is None or self.time_of(first, math.inf) > seconds:
            self.container.seek(0, stream=self.stream)
            return self.decoded()
        return itertools.chain([first], frames)

    def picture(self, frame: av.VideoFrame, size: int) -> np.ndarray:
        """RGB pixels (H, W, 3) of a frame, upright, its shorter side at most `size`: colours and scale in one go."""
        width, height = stored_size(frame.width, frame.height, size)
        converted = self.reformatter.reformat(frame, width, height, "rgb24", interpolation="AREA")
        return np.ascontiguousarray(np.rot90(converted.to_ndarray(), round(frame.rotation / 90) % 4))

    def decoded(self) -> Iterator[av.VideoFrame]:
        """Frames in the order of the decoder; broken packets are passed over."""
        for packet in self.container.demux(self.stream):
            try:
                yield from packet.decode()
            except av.FFmpegError as error:
                self.broken = self.broken or str(error.strerror)
