"""decode=dali: nvJPEG on a GPU, the same graph on the CPU without one."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import LifoQueue

import numpy as np
import simplejpeg
import torch
from nvidia.dali import Pipeline
from nvidia.dali.backend import ReleaseUnusedMemory  # type: ignore[attr-defined]

from loaders.decode.dali_graph import CopyStream, GraphSettings, build_pipeline, feed
from loaders.decode.decoder import BATCHES_AT_ONCE
from loaders.decode.pixels import Scratch, decode_clip, header_fault
from loaders.samples import BadSampleError, Clip, Window
from sharding.media.picture import is_upright_jpeg

log = logging.getLogger("loaders")

INTACT_SIDE = 64
INTACT = Clip(  # decodes wherever anything does
    [simplejpeg.encode_jpeg(np.full((INTACT_SIDE, INTACT_SIDE, 3), 128, np.uint8), colorspace="RGB")],
    INTACT_SIDE,
    INTACT_SIDE,
    Window(0, 0, INTACT_SIDE, INTACT_SIDE),
)
# Messages of failures that no image can cause; those of nvImageCodec are numbers of its nvimgcodecStatus_t.
_DEVICE = re.compile(r"cuda|alloc|out of memory|driver|nvjpeg_status_(?!bad_jpeg|jpeg_not_supported)", re.IGNORECASE)
_CODEC = re.compile(r"nvImageCodec failure: '#(\d+)'")
_IMAGE_FAILURES = {3, 4, 9, 13, 14, 18, 19}  # bad or incomplete stream, not supported


class _ImageError(RuntimeError):
    """A run failed, and the cause is one of its images."""


class DaliDecoder:
    """See loaders.decode.decoder.Decoder; a batch that fails is halved until the failing image is isolated.

    As many batches are decoded at once as the loader makes, each by its own pipeline, thread and CUDA stream, so that a
    run that fails harms no other. The second pipeline is built for the second batch, and takes as much memory again.

    device: number of the GPU; None runs the graph on the CPU.
    hw_decoder_load: see GraphSettings; with 0, without the JPEG engines, the bits of a picture do not depend on its
        row in the batch.
    Raises RuntimeError: DALI cannot decode on this device.
    """

    name = "dali"

    def __init__(
        self, size: int, threads: int, antialias: bool, device: int | None, hw_decoder_load: float = 0.65
    ) -> None:
        settings = GraphSettings(size, threads, antialias, device, hw_decoder_load)
        self._workers = [DaliWorker(settings) for _ in range(BATCHES_AT_ONCE)]
        self._free: LifoQueue[DaliWorker] = LifoQueue()  # last in, first out: evaluation builds one pipeline only
        for worker in self._workers:
            self._free.put(worker)
        try:
            self.decode([INTACT])
        except BaseException:
            self.close()
            raise

    def decode(self, clips: Sequence[Clip]) -> tuple[torch.Tensor, dict[int, str]]:
        """See Decoder.

        Raises RuntimeError: the device fails: no memory, a CUDA error.
        """
        worker = self._free.get()
        try:
            return worker.decode(clips)
        finally:
            self._free.put(worker)

    def close(self) -> None:
        """See Decoder; DALI's memory pools return what they do not use to the GPU."""
        for worker in self._workers:
            worker.close()
        ReleaseUnusedMemory()


class DaliWorker:
    """One pipeline and its thread; a pipeline that several threads use, even in turn, crashes after a failed run.

    With `exec_dynamic` a pipeline survives a failed run, whatever DALI's message says (there is a test for it).
    """

    def __init__(self, settings: GraphSettings) -> None:
        self.settings = settings
        self.pipeline: Pipeline | None = None
        self._capacity = 0
        self._copies = CopyStream(settings.device)
        self._warned = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dali")
        self._others = ThreadPoolExecutor(settings.threads, thread_name_prefix="others")

    def decode(self, clips: Sequence[Clip]) -> tuple[torch.Tensor, dict[int, str]]:
        """See Decoder."""
        return self._thread.submit(self._decode, clips).result()

    def close(self) -> None:
        """End the thread and the pipeline."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._others.shutdown(wait=True, cancel_futures=True)
        self.pipeline = None

    def _decode(self, clips: Sequence[Clip]) -> tuple[torch.Tensor, dict[int, str]]:
        shape = (len(clips), len(clips[0].jpegs), self.settings.size, self.settings.size, 3)
        is_plain = [all(map(is_upright_jpeg, clip.jpegs)) for clip in clips]
        plain = [row for row, plain in enumerate(is_plain) if plain]
        others = [row for row, plain in enumerate(is_plain) if not plain]
        bad = {plain[number]: fault for number, fault in header_faults([clips[row] for row in plain]).items()}
        rows = [row for row in plain if row not in bad]
        decoded = self._search(clips, rows, bad) if rows else []
        decoded += self._decode_others(clips, others, bad)
        if len(decoded) == 1 and not bad and not others:
            return decoded[0][1].view(shape), {}
        return self._copies.assembled(shape, decoded), bad

    def _search(
        self, clips: Sequence[Clip], rows: list[int], bad: dict[int, str]
    ) -> list[tuple[list[int], torch.Tensor]]:
        """Groups of the rows with their frames, halved until failing images are isolated; bad rows go to `bad`."""
        decoded, waiting = [], [rows]
        while waiting:
            group = waiting.pop()
            try:
                decoded.append((group, self._run([clips[row] for row in group])))
            except _ImageError as error:
                if len(group) > 1:
                    waiting += [group[: len(group) // 2], group[len(group) // 2 :]]
                    continue
                try:
                    decoded.append((group, self._decode_refused(clips[group[0]], str(error))))
                except BadSampleError as fault:
                    bad[group[0]] = str(fault)
        return decoded

    def _decode_others(
        self, clips: Sequence[Clip], rows: list[int], bad: dict[int, str]
    ) -> list[tuple[list[int], torch.Tensor]]:
        """Frames of the rows with images that DALI does not show as packing would store them, by the CPU path."""
        decoded = []
        for row, result in zip(rows, self._others.map(self._by_cpu, [clips[row] for row in rows])):
            if isinstance(result, BadSampleError):
                bad[row] = str(result)
            else:
                decoded.append(([row], result))
        return decoded

    def _by_cpu(self, clip: Clip) -> torch.Tensor | BadSampleError:
        """A clip's frames (T, S, S, 3) by the CPU path, or the reason why they cannot be decoded."""
        frames = np.empty((len(clip.jpegs), self.settings.size, self.settings.size, 3), np.uint8)
        try:
            decode_clip(clip, frames, self.settings.antialias, Scratch())
        except BadSampleError as error:
            return error
        return torch.from_numpy(frames)

    def _decode_refused(self, clip: Clip, message: str) -> torch.Tensor:
        """The frames of a clip that DALI does not decode, by the CPU path, so that both refuse the same samples.

        Raises BadSampleError where the CPU path refuses it too: only then is a sample bad.
        """
        frames = self._by_cpu(clip)
        if isinstance(frames, BadSampleError):
            raise frames
        if not self._warned:
            self._warned = True
            log.warning(
                "DALI does not decode an image that libjpeg-turbo or Pillow decodes (%s): such images are decoded on "
                "the CPU, which takes longer; if there are many, set decode=cpu",
                message,
            )
        return frames

    def _run(self, clips: Sequence[Clip]) -> torch.Tensor:
        """Frames (B*T, S, S, 3) uint8 on the device.

        Raises _ImageError: some of the images do not decode. RuntimeError: the device fails; that is never taken for a
        bad sample.
        """
        pipeline = self._built(sum(len(clip.jpegs) for clip in clips))
        feed(pipeline, clips)
        try:
            (output,) = pipeline.run()
        except RuntimeError as error:
            if is_device_failure(error):
                raise self._device_error(error) from error
            self._check_alive(error)
            raise _ImageError(reason(error)) from None
        return self._copies.copied(output)

    def _check_alive(self, error: RuntimeError) -> None:
        """Raise a RuntimeError unless an intact image can be decoded, if necessary with a new pipeline."""
        for _ in range(2):
            try:
                pipeline = self._built(1)
                feed(pipeline, [INTACT])
                pipeline.run()
                return
            except RuntimeError:
                self.pipeline = None
        raise self._device_error(error) from error

    def _device_error(self, error: RuntimeError) -> RuntimeError:
        where = "the CPU" if self.settings.device is None else f"cuda:{self.settings.device}"
        return RuntimeError(
            f"DALI fails on {where}, not caused by an image: {reason(error)}. If GPU memory is short, set "
            "decode=cpu or a smaller batch_size"
        )

    def _built(self, frames: int) -> Pipeline:
        """The pipeline, rebuilt when a batch is larger than any before."""
        if self.pipeline is None or frames > self._capacity:
            self.pipeline = None  # first: two may not fit the GPU
            self._capacity = max(frames, self._capacity)
            self.pipeline = build_pipeline(self.settings, self._capacity)
        return self.pipeline


def header_faults(clips: Sequence[Clip]) -> dict[int, str]:
    """Faults that the headers tell; a failed run costs time, and a truncated JPEG may harm the context of a GPU."""
    return {
        number: fault
        for number, clip in enumerate(clips)
        for fault in [next(filter(None, (header_fault(data, clip) for data in clip.jpegs)), None)]
        if fault is not None
    }


def is_device_failure(error: RuntimeError) -> bool:
    """Whether DALI's message reports a failure of memory, CUDA or the driver, which no image can cause."""
    text = encountered(error)
    status = _CODEC.search(text)
    if status is not None:
        return int(status[1]) not in _IMAGE_FAILURES
    return _DEVICE.search(text) is not None


def encountered(error: RuntimeError) -> str:
    """DALI's message without its stack, and without the place in our code where the graph was made."""
    text = str(error)
    return (text.partition("encountered:")[2] or text).partition("Stacktrace")[0]


def reason(error: RuntimeError) -> str:
    """The cause in DALI's message, in one line."""
    lines = [line.strip(" :") for line in encountered(error).splitlines() if line.strip()]
    return (lines or ["failed"])[0][:200]
