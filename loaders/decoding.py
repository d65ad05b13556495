"""The two ways from JPEG bytes to cropped 8-bit frames behind one interface, and the CPU one of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import torch

from loaders.decode_worker import packed
from loaders.pixels import Clip
from loaders.workers import MemoryPool, Workers

BACKENDS = ("auto", "dali", "cpu")


class Decoder(Protocol):
    """Decodes the clips of a batch; a bad one harms no other. Safe to use from several threads."""

    def decode(self, clips: Sequence[Clip]) -> tuple[torch.Tensor, dict[int, str]]:
        """Frames (B, T, S, S, 3) uint8 RGB, and the reason of each clip that failed (its frames are undefined)."""

    def close(self) -> None:
        """Release threads, processes and memory."""


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
    """Decoding threads or processes of a rank: as asked, or its share of the cores this process may run on."""
    return asked or max(1, len(os.sched_getaffinity(0)) // max(1, ranks_here))


class CpuDecoder:
    """libjpeg-turbo and OpenCV's bicubic in as many processes.

    Raises:
        OSError: a process cannot be started.
    """

    def __init__(self, size: int, processes: int, antialias: bool = False) -> None:
        self.size = size
        self._workers = Workers(processes, antialias)
        self._memories = MemoryPool()

    def decode(self, clips: Sequence[Clip]) -> tuple[torch.Tensor, dict[int, str]]:
        """See Decoder.

        Raises:
            RuntimeError: a decoding process has ended, with its signal.
        """
        shape = (len(clips), len(clips[0].jpegs), self.size, self.size, 3)
        memory, out = self._memories.array(shape, sum(len(data) for clip in clips for data in clip.jpegs))
        data, numbers = packed(clips, out.size)
        memory.map[out.size : out.size + len(data)] = data
        bad = self._workers.decode(memory, shape, numbers)
        frames = torch.from_numpy(out)
        return frames.pin_memory() if torch.cuda.is_available() else frames, bad

    def close(self) -> None:
        """See Decoder."""
        self._workers.close()
        self._memories.close()
