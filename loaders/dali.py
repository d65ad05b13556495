"""JPEG bytes to cropped 8-bit frames in one DALI graph: nvJPEG on a GPU, the same graph on the CPU without one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from loaders.decoding import Clip

QUEUE = 1  # iterations in flight; batches are made ahead of the step by the loader, not here


class DaliDecoder:
    """See loaders.decoding.Decoder; one image that fails costs its batch a search, never the pipeline.

    device: number of the GPU; None runs the graph on the CPU.
    """

    def __init__(self, size: int, threads: int, antialias: bool, device: int | None) -> None:
        self.size, self.threads, self.antialias, self.device = size, threads, antialias, device
        self._pipeline: Pipeline | None = None
        self._capacity = 0

    def decode(self, clips: list[Clip]) -> tuple[torch.Tensor, dict[int, str]]:
        """See Decoder."""
        length = len(clips[0].jpegs)
        shape = (len(clips), length, self.size, self.size, 3)
        try:
            return self._run(clips).view(shape), {}
        except RuntimeError:
            return self._search(clips, shape)

    def _search(self, clips: list[Clip], shape: tuple[int, ...]) -> tuple[torch.Tensor, dict[int, str]]:
        """Halve the batch until the clips that fail stand alone; the others are decoded."""
        device = "cpu" if self.device is None else f"cuda:{self.device}"
        frames = torch.zeros(shape, dtype=torch.uint8, device=device)
        bad: dict[int, str] = {}
        parts = [range(len(clips))]
        while parts:
            part = parts.pop()
            try:
                frames[part.start : part.stop] = self._run([clips[number] for number in part]).view(
                    len(part), *shape[1:]
                )
            except RuntimeError as error:
                if len(part) == 1:
                    bad[part.start] = f"DALI: {reason(error)}"
                else:
                    middle = (part.start + part.stop) // 2
                    parts += [range(part.start, middle), range(middle, part.stop)]
        return frames, bad

    def _run(self, clips: list[Clip]) -> torch.Tensor:
        """Frames (B*T, S, S, 3) uint8 on the device; raises RuntimeError when any of them does not decode."""
        jpegs = [np.frombuffer(data, np.uint8) for clip in clips for data in clip.jpegs]
        windows = [clip.window for clip in clips for _ in clip.jpegs]
        pipeline = self._built(len(jpegs))
        try:
            pipeline.feed_input("jpegs", jpegs)
            pipeline.feed_input("anchors", [np.array([w.top, w.left], np.int32) for w in windows])
            pipeline.feed_input("shapes", [np.array([w.height, w.width], np.int32) for w in windows])
            pipeline.feed_input("flips", [np.array(int(w.flip), np.int32) for w in windows])
            (output,) = pipeline.run()
        except RuntimeError:
            self._pipeline = None  # it may be invalid from here on: the next batch builds another
            raise
        return to_torch(output, self.device)

    def _built(self, frames: int) -> Pipeline:
        """The pipeline, rebuilt when a batch is larger than any before."""
        if self._pipeline is None or frames > self._capacity:
            self._capacity = max(frames, self._capacity)
            self._pipeline = build_pipeline(self._capacity, self.size, self.threads, self.antialias, self.device)
        return self._pipeline

    def close(self) -> None:
        """See Decoder."""
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
    """The line of DALI's message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "ailed" in line or "rror" in line]
    return (telling or lines or ["failed"])[-1][:200]
