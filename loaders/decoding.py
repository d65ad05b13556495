"""The two ways from JPEG bytes to cropped 8-bit frames behind one interface, and the CPU one of them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import simplejpeg
import torch

from loaders.clips import Window
from loaders.storage import BadSampleError

BACKENDS = ("auto", "dali", "cpu")

cv2.setNumThreads(0)  # our threads are one a clip; nested ones only get in the way


@dataclass(frozen=True)
class Clip:
    """What is to be decoded: T frames' bytes, their size in the index, and the part to show."""

    jpegs: list[bytes]
    height: int
    width: int
    window: Window


class Decoder(Protocol):
    """Decodes the clips of a batch; a bad one harms no other."""

    def decode(self, clips: list[Clip]) -> tuple[torch.Tensor, dict[int, str]]:
        """Frames (B, T, S, S, 3) uint8 RGB, and the reason of each clip that failed (its frames are undefined)."""

    def close(self) -> None:
        """Release threads and memory."""


def make_decoder(backend: str, size: int, threads: int, antialias: bool) -> Decoder:
    """The decoder of `decode=auto|dali|cpu`; auto is DALI on a GPU and libjpeg-turbo elsewhere.

    Raises:
        ValueError: unknown backend, or DALI is asked for and not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"decode is {backend!r}, must be one of {', '.join(BACKENDS)}")
    if backend == "dali" or (backend == "auto" and torch.cuda.is_available()):
        from loaders.dali import DaliDecoder

        return DaliDecoder(size, threads, antialias, torch.cuda.current_device() if torch.cuda.is_available() else None)
    return CpuDecoder(size, threads, antialias)


def usable_threads(asked: int, ranks_here: int) -> int:
    """Threads for a rank: as asked, or its share of the cores this process may run on."""
    return asked or max(1, len(os.sched_getaffinity(0)) // max(1, ranks_here))


class CpuDecoder:
    """libjpeg-turbo and OpenCV's bicubic on a pool of threads; both release the GIL."""

    def __init__(self, size: int, threads: int, antialias: bool = False) -> None:
        self.size, self.antialias = size, antialias
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def decode(self, clips: list[Clip]) -> tuple[torch.Tensor, dict[int, str]]:
        """See Decoder."""
        length = len(clips[0].jpegs)
        frames = torch.empty((len(clips), length, self.size, self.size, 3), dtype=torch.uint8)
        reasons = self.pool.map(self._decode_clip, clips, frames.numpy())
        bad = {number: reason for number, reason in enumerate(reasons) if reason}
        return (frames.pin_memory() if torch.cuda.is_available() else frames), bad

    def _decode_clip(self, clip: Clip, out: np.ndarray) -> str:
        """Write a clip's frames into `out` (T, S, S, 3); returns the reason when one does not decode."""
        done: dict[int, int] = {}
        for number, data in enumerate(clip.jpegs):
            if id(data) in done:  # a repeated frame is decoded once
                out[number] = out[done[id(data)]]
                continue
            try:
                show(decode_frame(data, clip), clip.window, out[number], self.antialias)
            except BadSampleError as error:
                return f"frame {number}: {error}"
            done[id(data)] = number
        return ""

    def close(self) -> None:
        """See Decoder."""
        self.pool.shutdown(wait=True, cancel_futures=True)


def decode_frame(data: bytes, clip: Clip) -> np.ndarray:
    """RGB pixels (H, W, 3); JPEG by libjpeg-turbo, other forms (foreign shards hold them) by OpenCV."""
    pixels: np.ndarray | None = None
    try:
        if data[:2] == b"\xff\xd8":
            pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
        elif data:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except (ValueError, cv2.error) as error:
        raise BadSampleError(f"broken image: {error}") from None
    if pixels is None:
        raise BadSampleError(f"{len(data)} bytes that are no image")
    if pixels.shape[:2] != (clip.height, clip.width):
        raise BadSampleError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels, the index says {clip.width}x{clip.height}")
    return pixels


def show(pixels: np.ndarray, window: Window, out: np.ndarray, antialias: bool) -> None:
    """Write a picture's window into `out` (S, S, 3), resized bicubically, mirrored if it says so."""
    size = out.shape[0]
    crop = pixels[window.top : window.top + window.height, window.left : window.left + window.width]
    if crop.shape[:2] != (size, size):
        smaller = antialias and min(crop.shape[:2]) > size
        crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)
    np.copyto(out, crop[:, ::-1] if window.flip else crop)
