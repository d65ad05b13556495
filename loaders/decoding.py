"""The two ways from JPEG bytes to cropped 8-bit frames behind one interface, and the CPU one of them."""

from __future__ import annotations

import io
import math
import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image

from loaders.clips import Window
from loaders.storage import BadSampleError

BACKENDS = ("auto", "dali", "cpu")
PARTS_PER_THREAD = 2  # a batch is dealt out in so many parts, so that the threads end together

cv2.setNumThreads(0)  # our threads are one a clip; nested ones only get in the way


class Clip(NamedTuple):
    """What is to be decoded: T frames' bytes, their size in the index, and the part to show."""

    jpegs: list[bytes]
    height: int
    width: int
    window: Window


class Decoder(Protocol):
    """Decodes the clips of a batch; a bad one harms no other. Safe to use from several threads."""

    def decode(self, clips: Sequence[Clip]) -> tuple[torch.Tensor, dict[int, str]]:
        """Frames (B, T, S, S, 3) uint8 RGB, and the reason of each clip that failed (its frames are undefined)."""

    def close(self) -> None:
        """Release threads and memory."""


def make_decoder(backend: str, size: int, threads: int, antialias: bool) -> Decoder:
    """The decoder of `decode=auto|dali|cpu`; auto is DALI where there is a GPU and it is installed, else libjpeg-turbo.

    Raises:
        ValueError: unknown backend, or DALI is asked for and not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"decode is {backend!r}, must be one of {', '.join(BACKENDS)}")
    if backend == "cpu" or (backend == "auto" and not torch.cuda.is_available()):
        return CpuDecoder(size, threads, antialias)
    try:
        from loaders.dali import DaliDecoder
    except ImportError as error:
        if backend == "auto":
            return CpuDecoder(size, threads, antialias)
        raise ValueError(
            f"decode=dali, but NVIDIA DALI cannot be imported ({error}): install it with "
            "`pip install .[cuda13]` (or cuda12), or set decode=cpu"
        ) from None
    return DaliDecoder(size, threads, antialias, torch.cuda.current_device() if torch.cuda.is_available() else None)


def usable_threads(asked: int, ranks_here: int) -> int:
    """Threads for a rank: as asked, or its share of the cores this process may run on."""
    return asked or max(1, len(os.sched_getaffinity(0)) // max(1, ranks_here))


class CpuDecoder:
    """libjpeg-turbo and OpenCV's bicubic on a pool of threads; both release the GIL."""

    def __init__(self, size: int, threads: int, antialias: bool = False) -> None:
        self.size, self.antialias, self.threads = size, antialias, threads
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._scratch = Scratch()
        self._memory = UsedAgain()

    def decode(self, clips: Sequence[Clip]) -> tuple[torch.Tensor, dict[int, str]]:
        """See Decoder."""
        shape = (len(clips), len(clips[0].jpegs), self.size, self.size, 3)
        if torch.cuda.is_available():
            frames = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        else:
            frames = torch.from_numpy(self._memory.array(shape))
        out = frames.numpy()
        count = min(len(clips), self.threads * PARTS_PER_THREAD)
        bad: dict[int, str] = {}
        parts = [range(part, len(clips), count) for part in range(count)]
        for found in self.pool.map(lambda part: self._decode_part(clips, part, out), parts):
            bad.update(found)
        return frames, bad

    def _decode_part(self, clips: Sequence[Clip], part: range, out: np.ndarray) -> dict[int, str]:
        """Write the frames of some clips into `out` (B, T, S, S, 3); the reasons of those that do not decode."""
        bad = {}
        for number in part:
            try:
                self._decode_clip(clips[number], out[number])
            except BadSampleError as error:
                bad[number] = str(error)
        return bad

    def _decode_clip(self, clip: Clip, out: np.ndarray) -> None:
        """Write a clip's frames into `out` (T, S, S, 3); raises BadSampleError naming the frame that fails."""
        size = self.size
        as_it_is = clip.height == clip.width == size and clip.window == (0, 0, size, size, False)
        room = None if as_it_is else self._scratch.room(0, clip.height * clip.width * 3)
        for number, data in enumerate(clip.jpegs):
            if number and data is clip.jpegs[number - 1]:  # a repeated frame is decoded once
                out[number] = out[number - 1]
                continue
            try:
                pixels = decode_frame(data, clip, out[number] if room is None else room)
            except BadSampleError as error:
                raise BadSampleError(f"frame {number} of those shown: {error}") from None
            if room is not None or not np.may_share_memory(pixels, out):  # else it was decoded into its place
                mirror = self._scratch.room(1, size * size * 3)
                show(pixels, clip.window, out[number], self.antialias, mirror)

    def close(self) -> None:
        """See Decoder."""
        self.pool.shutdown(wait=True, cancel_futures=True)


class Scratch(threading.local):
    """Each thread's own memory, used again: fresh pages cost as much as decoding."""

    def __init__(self) -> None:
        self._rooms: dict[int, np.ndarray] = {}

    def room(self, number: int, size: int) -> np.ndarray:
        """Room `number`, of `size` bytes or more."""
        if number not in self._rooms or self._rooms[number].size < size:
            self._rooms[number] = np.empty(size, np.uint8)
        return self._rooms[number]


class UsedAgain:
    """Arrays whose memory, once nobody refers to them any more, serves the next ones: fresh pages cost time."""

    SIZES = 4  # of which memory is kept

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """Bytes of that shape, their contents undefined."""
        size = math.prod(shape)
        if size not in self._free and len(self._free) == self.SIZES:
            del self._free[next(iter(self._free))]
        free = self._free.setdefault(size, [])
        memory = free.pop() if free else np.empty(size, np.uint8)
        array = memory.reshape(shape)
        weakref.finalize(array, self._take_back, memory).atexit = False
        return array

    def _take_back(self, memory: np.ndarray) -> None:
        free = self._free.get(memory.size)
        if free is not None:
            free.append(memory)


def decode_frame(data: bytes, clip: Clip, room: np.ndarray | None = None) -> np.ndarray:
    """RGB pixels (H, W, 3), in `room` where they are a JPEG's; raises BadSampleError when there are none."""
    try:
        if data[:2] == b"\xff\xd8":
            pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, buffer=room)
        else:
            pixels = decode_other(data)
    except ValueError as error:
        raise BadSampleError(f"broken image: {error}") from None
    if pixels.shape[:2] != (clip.height, clip.width):
        raise BadSampleError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels, the index says {clip.width}x{clip.height}")
    return pixels


def header_fault(data: bytes, clip: Clip) -> str | None:
    """What an image's header already tells against it, by looking at some bytes of it; None when nothing."""
    try:
        if data[:2] == b"\xff\xd8":
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
        else:
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
    except Exception as error:  # Pillow's parsers raise many kinds
        return f"{len(data)} bytes that are no image ({type(error).__name__})"
    if (height, width) != (clip.height, clip.width):
        return f"{width}x{height} pixels, the index says {clip.width}x{clip.height}"
    return None


def decode_other(data: bytes) -> np.ndarray:
    """RGB pixels (H, W, 3) of an image that is no JPEG; foreign shards hold PNG, WebP and others."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's parsers raise many kinds; all mean that the bytes are of no use
        raise BadSampleError(f"{len(data)} bytes that are no image ({type(error).__name__})") from None


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
