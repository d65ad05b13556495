"""Which frames of a clip are shown: the samplers that `video_input.sample_type` and `sample_type_test` choose among."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

import numpy as np

from runtime.errors import UserError
from runtime.plugins import Registry

FrameSampler = Callable[..., np.ndarray]

# A sampler is called with num_frames, length, fps, numbers: frames wanted; frames of the clip; frames per second of the
# clip; (num_frames,) random numbers in [0, 1), all 0.5 in evaluation. It returns indices (N,) below `length`, 1 to
# num_frames of them; where there are fewer, the last one is repeated. The name of a sampler with a parameter ends in X,
# which stands for a number above 0: sample type fps2 calls `fpsX` with x=2.
SETTING = "video_input.sample_type or sample_type_test"
FRAME_SAMPLERS: Registry[FrameSampler] = Registry(SETTING, "with a number above 0 for X, such as fps0.5")


@FRAME_SAMPLERS("rand")
def random_frame_of_each(num_frames: int, length: int, fps: float, numbers: np.ndarray) -> np.ndarray:
    """A random frame of each of num_frames equal intervals."""
    edges = np.linspace(0, length, min(num_frames, length) + 1).astype(np.int64)
    return edges[:-1] + (numbers[: len(edges) - 1] * np.diff(edges)).astype(np.int64)


@FRAME_SAMPLERS("middle")
def middle_of_each(num_frames: int, length: int, fps: float, numbers: np.ndarray) -> np.ndarray:
    """The middle frame of each of num_frames equal intervals."""
    edges = np.linspace(0, length, min(num_frames, length) + 1).astype(np.int64)
    return (edges[:-1] + edges[1:] - 1) // 2


@FRAME_SAMPLERS("shuffled")
def middle_of_each_shuffled(num_frames: int, length: int, fps: float, numbers: np.ndarray) -> np.ndarray:
    """The frames of `middle` in another order, which depends on the length alone: tests what their order tells."""
    chosen = middle_of_each(num_frames, length, fps, numbers)
    generator, last = np.random.default_rng(length), np.arange(len(chosen))
    while len(chosen) > 1 and (np.diff(last) > 0).all():
        last = generator.permutation(len(chosen))
    return chosen[last]


@FRAME_SAMPLERS("fpsX")
def per_second(num_frames: int, length: int, fps: float, numbers: np.ndarray, x: float) -> np.ndarray:
    """The frames at x per second, spread evenly where they are more than num_frames."""
    chosen = frames_at_rate(x, length, fps)
    if len(chosen) > num_frames:
        chosen = chosen[np.linspace(0, len(chosen) - 1, num_frames).round().astype(np.int64)]
    return chosen


def frame_sampler(sample_type: str) -> FrameSampler:
    """The sampler of a sample type; raises UserError, with those there are, if there is none."""
    if sample_type.endswith("X"):
        raise UserError(f"{SETTING} is {sample_type!r}: X stands for a number above 0, write one, such as fps0.5")
    for name in FRAME_SAMPLERS:
        stem = name.removesuffix("X")
        if stem != name and sample_type.startswith(stem):
            with suppress(ValueError):
                if (number := float(sample_type[len(stem) :])) > 0:
                    return partial(FRAME_SAMPLERS[name], x=number)
    return FRAME_SAMPLERS[sample_type]


def choose_frames(
    sample_type: str, num_frames: int, length: int, fps: float, numbers: np.ndarray | None = None
) -> np.ndarray:
    """Indices (num_frames,) int64 of the frames to show of a clip of `length` frames stored at `fps` per second.

    numbers: (num_frames,) random ones in [0, 1) for samplers that use them; by default all 0.5.
    Raises UserError: there is no such sample_type, or its sampler returns wrong indices.
    """
    numbers = np.full(num_frames, 0.5) if numbers is None else numbers
    chosen = np.asarray(frame_sampler(sample_type)(num_frames, length, fps, numbers))
    fits = chosen.ndim == 1 and chosen.dtype.kind in "iu" and 1 <= len(chosen) <= num_frames
    if not fits or chosen.min() < 0 or chosen.max() >= length:
        raise UserError(
            f"frame sampler {sample_type} returned {chosen.tolist()} for {num_frames} of {length} frames: "
            f"must return an array of 1 to {num_frames} whole numbers from 0 to {length - 1}"
        )
    return np.concatenate([chosen, np.full(num_frames - len(chosen), chosen[-1])]).astype(np.int64)


def random_frames(num_frames: int, lengths: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """`choose_frames("rand", ...)` of B clips at once: (B, num_frames) of lengths (B,) and numbers (B, num_frames)."""
    edges = np.linspace(0, lengths, num_frames + 1, axis=1).astype(np.int64)
    chosen = edges[:, :-1] + (numbers * np.diff(edges, axis=1)).astype(np.int64)
    for row in np.flatnonzero(lengths < num_frames).tolist():
        chosen[row] = choose_frames("rand", num_frames, int(lengths[row]), 1.0, numbers[row])
    return chosen


def frames_at_rate(rate: float, length: int, fps: float) -> np.ndarray:
    """Indices of the frames nearest to 1/2X, 3/2X, 5/2X ... seconds; the middle one if there is none."""
    seconds = np.arange(0.5 / rate, length / fps + 0.5 / rate, 1 / rate)
    found = np.around(seconds * fps).astype(np.int64)
    found = found[found < length]
    return found if len(found) else np.array([length // 2], np.int64)
