"""The ways from JPEG bytes to cropped 8-bit frames behind one interface, the choice among them, and the CPU one."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from importlib.metadata import distributions
from typing import Protocol

import torch

from loaders.decode.auto import AutoDecoder
from loaders.decode.pixels import Clip
from loaders.decode.pool import MemoryPool, Workers
from loaders.decode.worker import packed
from runtime.errors import UserError

log = logging.getLogger("loaders")

BACKENDS = ("auto", "dali", "cpu")
BATCHES_AT_ONCE = 2  # in the decoding stage: the second one fills the gaps at the end of the first
DALI_PACKAGE = "nvidia-dali-cuda"  # and CUDA's version: 120, 130


class Decoder(Protocol):
    """Decodes the clips of a batch; a bad one harms no other. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """Which of BACKENDS decodes."""

    def decode(self, clips: Sequence[Clip]) -> tuple[torch.Tensor, dict[int, str]]:
        """Frames (B, T, S, S, 3) uint8 RGB, and the reason of each clip that failed (its frames are undefined)."""

    def close(self) -> None:
        """Release threads, processes and memory."""


def make_decoder(
    backend: str, size: int, threads: int, antialias: bool, device: torch.device, deterministic: bool = False
) -> Decoder:
    """The decoder of `decode=auto|dali|cpu` for a run that computes on `device`.

    auto: without a GPU libjpeg-turbo; on one both, until it is known which makes training wait less.
    deterministic: nothing is measured, auto is libjpeg-turbo; DALI leaves the GPU's JPEG engines out.

    Raises:
        ValueError: unknown backend, or decode=dali where DALI cannot be used.
    """
    if backend not in BACKENDS:
        raise UserError(f"decode is {backend!r}, must be one of {', '.join(BACKENDS)}")
    on_gpu = device.type == "cuda"
    if backend == "cpu" or (backend == "auto" and (deterministic or not on_gpu)):
        return CpuDecoder(size, threads, antialias, pin=on_gpu)
    try:
        dali = _dali(size, threads, antialias, device, deterministic)
    except _UnusableError as error:
        if backend == "dali":
            raise UserError(f"decode=dali, but {error}, or set decode=cpu") from None
        log.warning("decode=auto: images are decoded on the CPU, because %s", error)
        return CpuDecoder(size, threads, antialias, pin=on_gpu)
    return dali if backend == "dali" else AutoDecoder(CpuDecoder(size, threads, antialias, pin=on_gpu), dali)


class _UnusableError(Exception):
    """DALI cannot be used here, and what would help."""


def _dali(size: int, threads: int, antialias: bool, device: torch.device, deterministic: bool) -> Decoder:
    """DALI's decoder; raises _UnusableError where it is not installed, of another CUDA, or fails on this device."""
    number = None
    if device.type == "cuda":
        number = torch.cuda.current_device() if device.index is None else device.index
        _check_cuda_majors()
    try:
        from loaders.decode.dali import DaliDecoder
    except (ImportError, OSError) as error:
        raise _UnusableError(
            f"NVIDIA DALI cannot be imported ({error}): install it with `pip install .[cuda13]` (or cuda12)"
        ) from None
    try:
        return DaliDecoder(size, threads, antialias, number, **({"hw_decoder_load": 0.0} if deterministic else {}))
    except RuntimeError as error:
        raise _UnusableError(
            f"NVIDIA DALI cannot decode on {device} ({str(error).strip().splitlines()[0]}): check the GPU's driver, "
            "its free memory and DALI's version with `python -m launch.doctor`"
        ) from error


def _check_cuda_majors() -> None:
    """Raise _UnusableError where DALI's package and PyTorch are made for different CUDA majors."""
    names = [(found.metadata["Name"] or "").lower().replace("_", "-") for found in distributions()]
    majors = {name.removeprefix(DALI_PACKAGE)[:2] for name in names if name.startswith(DALI_PACKAGE)}
    ours = (torch.version.cuda or "").partition(".")[0]
    if majors and ours and ours not in majors:
        raise _UnusableError(
            f"NVIDIA DALI is installed for CUDA {', '.join(sorted(majors))} and PyTorch for CUDA {ours}: install DALI "
            f"with `pip install .[cuda{ours}]`"
        )


def usual_device() -> str:
    """Where a program computes that is no job: on the GPU if PyTorch sees one, and DS_ACCELERATOR does not say cpu."""
    return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"


def usable_threads(asked: int, ranks_here: int) -> int:
    """Decoding threads or processes of a rank: as asked, or its share of the cores this process may run on."""
    return asked or max(1, len(os.sched_getaffinity(0)) // max(1, ranks_here))


class CpuDecoder:
    """libjpeg-turbo and OpenCV's bicubic in as many processes.

    pin: frames come in pinned memory, for a copy to a GPU that does not block.

    Raises:
        OSError: a process cannot be started.
    """

    name = "cpu"

    def __init__(self, size: int, processes: int, antialias: bool = False, pin: bool = False) -> None:
        self.size, self.pin = size, pin
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
        # `pin_memory` has copied when it returns, so that the shared memory can serve the next batch.
        return frames.pin_memory() if self.pin else frames, bad

    def close(self) -> None:
        """See Decoder."""
        self._workers.close()
        self._memories.close()
