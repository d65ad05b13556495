"""JPEG bytes to cropped 8-bit frames in one DALI graph: nvJPEG on a GPU, the same graph on the CPU without one."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from loaders.pixels import Clip, header_fault

QUEUE = 1  # iterations in flight; batches are made ahead of the step by the loader, not here


class DaliDecoder:
    """See loaders.decoding.Decoder; one image that fails costs its batch a search by halves.

    With `exec_dynamic` a pipeline lives through a failed run, whatever DALI's message says (pinned by a test).

    device: number of the GPU; None runs the graph on the CPU.
    """

    def __init__(self, size: int, threads: int, antialias: bool, device: int | None) -> None:
        self.size, self.threads, self.antialias, self.device = size, threads, antialias, device
        self._pipeline: Pipeline | None = None
        self._capacity = 0
        # A pipeline that is used from several threads, be it in turn, ends in a crash or a hang after a failed run.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dali")

    def decode(self, clips: Sequence[Clip]) -> tuple[torch.Tensor, dict[int, str]]:
        """See Decoder."""
        return self._thread.submit(self._decode, clips).result()

    def _decode(self, clips: Sequence[Clip]) -> tuple[torch.Tensor, dict[int, str]]:
        bad = {
            number: fault
            for number, clip in enumerate(clips)
            for fault in [next(filter(None, (header_fault(data, clip) for data in clip.jpegs)), None)]
            if fault is not None
        }
        if not bad:
            return self._decode_checked(clips)
        device = "cpu" if self.device is None else f"cuda:{self.device}"
        frames = torch.zeros((len(clips), *self._shape(clips)[1:]), dtype=torch.uint8, device=device)
        rows = [number for number in range(len(clips)) if number not in bad]
        if rows:
            frames[torch.tensor(rows)], more = self._decode_checked([clips[row] for row in rows])
            bad |= {rows[place]: reason for place, reason in more.items()}
        return frames, bad

    def _shape(self, clips: Sequence[Clip]) -> tuple[int, ...]:
        return (len(clips), len(clips[0].jpegs), self.size, self.size, 3)

    def _decode_checked(self, clips: Sequence[Clip]) -> tuple[torch.Tensor, dict[int, str]]:
        """`decode` of clips whose headers are sound; a failed run is dear, and not without danger to the process."""
        shape = self._shape(clips)
        try:
            return self._run(clips).view(shape), {}
        except RuntimeError as error:
            frames, bad = self._search(clips, shape, error)
        if len(bad) == len(clips):  # all bad, or a pipeline that did not live through the failure
            self._pipeline = None
            frames, bad = self._search(clips, shape, None)
        return frames, bad

    def _search(
        self, clips: Sequence[Clip], shape: tuple[int, ...], error: RuntimeError | None
    ) -> tuple[torch.Tensor, dict[int, str]]:
        """Halve a batch, whose run failed with `error` if it was tried, until the clips that fail stand alone."""
        device = "cpu" if self.device is None else f"cuda:{self.device}"
        frames = torch.zeros(shape, dtype=torch.uint8, device=device)
        bad: dict[int, str] = {}
        parts: list[tuple[range, RuntimeError | None]] = [(range(len(clips)), error)]
        while parts:
            part, error = parts.pop()
            if error is None:
                try:
                    pixels = self._run(clips[part.start : part.stop])
                    frames[part.start : part.stop] = pixels.view(len(part), *shape[1:])
                    continue
                except RuntimeError as failed:
                    error = failed
            if len(part) == 1:
                bad[part.start] = f"DALI: {reason(error)}"
            else:
                middle = (part.start + part.stop) // 2
                parts += [(range(part.start, middle), None), (range(middle, part.stop), None)]
        return frames, bad

    def _run(self, clips: Sequence[Clip]) -> torch.Tensor:
        """Frames (B*T, S, S, 3) uint8 on the device; raises RuntimeError when any of them does not decode."""
        jpegs = [np.frombuffer(data, np.uint8) for clip in clips for data in clip.jpegs]
        windows = [clip.window for clip in clips for _ in clip.jpegs]
        pipeline = self._built(len(jpegs))
        pipeline.feed_input("jpegs", jpegs)
        pipeline.feed_input("anchors", [np.array([w.top, w.left], np.int32) for w in windows])
        pipeline.feed_input("shapes", [np.array([w.height, w.width], np.int32) for w in windows])
        pipeline.feed_input("flips", [np.array(int(w.flip), np.int32) for w in windows])
        (output,) = pipeline.run()
        return to_torch(output, self.device)

    def _built(self, frames: int) -> Pipeline:
        """The pipeline, rebuilt when a batch is larger than any before."""
        if self._pipeline is None or frames > self._capacity:
            self._capacity = max(frames, self._capacity)
            self._pipeline = build_pipeline(self._capacity, self.size, self.threads, self.antialias, self.device)
        return self._pipeline

    def close(self) -> None:
        """See Decoder."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._pipeline = None


def build_pipeline(capacity: int, size: int, threads: int, antialias: bool, device: int | None) -> Pipeline:
    """The graph: decode the window only, resize it bicubically, mirror; bytes stay bytes."""
    pipeline = Pipeline(
        batch_size=capacity, num_threads=threads, device_id=device, prefetch_queue_depth=QUEUE, exec_dynamic=True
    )
    with pipeline:
        jpegs, anchors, shapes, flips = (
            fn.external_source(name=name) for name in ("jpegs", "anchors", "shapes", "flips")
        )
        pixels = fn.decoders.image_slice(
            jpegs,
            anchors,
            shapes,
            device="cpu" if device is None else "mixed",
            axes=(0, 1),
            normalized_anchor=False,
            normalized_shape=False,
            output_type=types.DALIImageType.RGB,
            jpeg_fancy_upsampling=True,
            adjust_orientation=False,  # windows are given in the pixels as stored
        )
        shown: Any = fn.resize(
            pixels,
            size=(size, size),
            interp_type=types.DALIInterpType.INTERP_CUBIC,
            antialias=antialias,
            subpixel_scale=False,
        )
        pipeline.set_outputs(fn.flip(shown, horizontal=flips))
    pipeline.build()
    return pipeline


def to_torch(output: Any, device: int | None) -> torch.Tensor:
    """A DALI batch of equal shapes as a tensor that owns its memory; on a GPU nothing passes the host."""
    tensor = output.as_tensor()
    if device is None:
        return torch.from_numpy(np.array(tensor))
    return torch.from_dlpack(tensor).clone()


def reason(error: RuntimeError) -> str:
    """What DALI's message says it encountered."""
    _, _, encountered = str(error).partition("encountered:")
    lines = [line.strip(" :") for line in (encountered or str(error)).splitlines() if line.strip()]
    return (lines or ["failed"])[0][:200]
