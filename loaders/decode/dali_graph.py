"""The DALI graph for a batch of images, and the copy of its output to PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from loaders.samples import Clip

# Batches in flight in one pipeline. Batches at the same time take several pipelines: a failed run harms no other.
QUEUE_DEPTH = 1


@dataclass(frozen=True)
class GraphSettings:
    """Parameters of a pipeline.

    device: number of the GPU; None runs the graph on the CPU.
    hw_decoder_load: the share of a batch that a GPU's JPEG engines decode, where it has them; CUDA decodes the rest.
    """

    size: int
    threads: int
    antialias: bool
    device: int | None
    hw_decoder_load: float


def build_pipeline(settings: GraphSettings, capacity: int) -> Pipeline:
    """The graph: decode, cut out the window, resize it bicubically, mirror; bytes stay bytes."""
    on_cpu = settings.device is None
    pipeline = Pipeline(
        batch_size=capacity,
        num_threads=settings.threads,
        device_id=settings.device,
        prefetch_queue_depth=QUEUE_DEPTH,
        exec_dynamic=True,
    )
    with pipeline:
        jpegs, anchors, shapes, flips = (
            fn.external_source(name=name) for name in ("jpegs", "anchors", "shapes", "flips")
        )
        # Not fn.decoders.image_slice: nvJPEG before 13.2 leaves windows with fancy upsampling to the CPU, and warns for
        # every image (seen on an H200 with DALI 2.4.0).
        whole = fn.decoders.image(
            jpegs,
            device="cpu" if on_cpu else "mixed",
            output_type=types.DALIImageType.RGB,
            jpeg_fancy_upsampling=True,
            hw_decoder_load=settings.hw_decoder_load,
            adjust_orientation=False,  # windows are given in the pixels as stored
        )
        pixels = fn.slice(whole, anchors, shapes, axes=(0, 1), normalized_anchor=False, normalized_shape=False)
        shown: Any = fn.resize(
            pixels,
            size=(settings.size, settings.size),
            interp_type=types.DALIInterpType.INTERP_CUBIC,
            antialias=settings.antialias,
            subpixel_scale=False,
        )
        pipeline.set_outputs(fn.flip(shown, horizontal=flips))
    pipeline.build()
    return pipeline


def feed(pipeline: Pipeline, clips: Sequence[Clip]) -> None:
    """Give a pipeline the B*T frames of the next run; numbers as one array each, which halves the time in DALI."""
    pipeline.feed_input("jpegs", [np.frombuffer(data, np.uint8) for clip in clips for data in clip.jpegs])
    windows = np.repeat(np.array([clip.window for clip in clips], np.int32), len(clips[0].jpegs), axis=0)  # (B*T, 5)
    pipeline.feed_input("anchors", np.ascontiguousarray(windows[:, :2]))
    pipeline.feed_input("shapes", np.ascontiguousarray(windows[:, 2:4]))
    pipeline.feed_input("flips", np.ascontiguousarray(windows[:, 4]))


class CopyStream:
    """Copies DALI's output into memory of PyTorch's, on a separate CUDA stream; plain copies without a GPU.

    DALI reuses the memory of an output as soon as nothing refers to it. Its DLPack export makes the reader's stream
    wait for DALI, but nothing makes DALI wait for the reader. So a copy must be finished before the output is
    released; on PyTorch's default stream it would be queued behind the training step.

    device: number of the GPU; None without one.
    """

    def __init__(self, device: int | None) -> None:
        self.device = torch.device("cpu") if device is None else torch.device("cuda", device)
        self._stream = None if device is None else torch.cuda.Stream(self.device)

    def copied(self, output: Any) -> torch.Tensor:
        """A DALI batch of equal shapes as a tensor that owns its memory; on a GPU no byte passes through the host."""
        tensor = output.as_tensor()
        if self._stream is None:
            return torch.from_numpy(np.array(tensor))
        # `from_dlpack` tells DALI the current stream, which is this one within `_finished`.
        return self._finished(lambda: torch.from_dlpack(tensor).clone())

    def assembled(self, shape: tuple[int, ...], decoded: Sequence[tuple[Sequence[int], torch.Tensor]]) -> torch.Tensor:
        """Frames of that shape, (B, T, S, S, 3) uint8, from pairs of (rows, their frames); other rows are 0."""

        def assemble() -> torch.Tensor:
            frames = torch.zeros(shape, dtype=torch.uint8, device=self.device)
            for rows, pixels in decoded:
                for row, visual in zip(rows, pixels.view(len(rows), *shape[1:]), strict=True):
                    frames[row].copy_(visual)
            return frames

        return self._finished(assemble)

    def _finished(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor of `make` after its kernels finished, for use on the default stream."""
        if self._stream is None:
            return make()
        try:
            with torch.cuda.stream(self._stream):
                frames = make()
        finally:
            self._stream.synchronize()  # for this stream only: the step's is not waited for
        # Without it PyTorch would give the memory, once freed, to this stream while the step's stream still uses it.
        frames.record_stream(torch.cuda.default_stream(self.device))
        return frames
