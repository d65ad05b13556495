"""Random choices for a sample: frames, crop, flip and caption, by a counter-based generator."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from loaders.config import VideoInput
from loaders.index import Record
from loaders.samples import Window
from runtime.errors import UserError

CROP_AREA = (0.5, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
CROP_TRIES = 10
FLIP, TEXT, CROP, FRAMES = 0, 1, 2, 64  # first random number of a sample for each choice
ONE_FRAME = np.zeros(1, np.int64)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class RandomChoices(NamedTuple):
    """The random choices for B samples: frames (T,) and a window of each; numbers (B,) in [0, 1) pick captions."""

    frames: Sequence[np.ndarray]
    windows: Sequence[Window]
    captions: np.ndarray


def random_choices(
    records: Sequence[Record], keys: np.ndarray, video: VideoInput | None, augment: bool, flip: bool
) -> RandomChoices:
    """The choices for B samples with these keys (B,) of `sample_keys`; video is None for images, of one frame each."""
    heights, widths = (np.array([getattr(record, side) for record in records]) for side in ("height", "width"))
    windows = (
        random_windows(heights, widths, keys, flip)
        if augment
        else [Window(0, 0, record.height, record.width) for record in records]
    )
    frames = [ONE_FRAME] * len(records) if video is None else clip_frames(records, keys, video)
    return RandomChoices(frames, windows, random_numbers(keys, TEXT, 1)[:, 0])


def clip_frames(records: Sequence[Record], keys: np.ndarray, video: VideoInput) -> list[np.ndarray]:
    """Indices of the sampled frames of each clip, (T,) each."""
    lengths = np.array([max(1, len(record.sizes)) for record in records])
    if video.sample_type == "rand":
        return list(random_frames(video.num_frames, lengths, random_numbers(keys, FRAMES, video.num_frames)))
    return [
        choose_frames(video.sample_type, video.num_frames, length, record.fps)
        for length, record in zip(lengths.tolist(), records, strict=True)
    ]


def choose_frames(
    sample_type: str, num_frames: int, length: int, fps: float, numbers: np.ndarray | None = None
) -> np.ndarray:
    """Indices (num_frames,) int64 of the frames to show of a clip of `length` frames stored at `fps` a second.

    `rand`: a random frame of each of num_frames equal intervals; `middle`: the middle one of each; `fpsX`: frames at
    X a second, spread evenly where they are more than num_frames. Where there are too few, the last is repeated.

    numbers: (num_frames,) random ones in [0, 1), for `rand`. Raises UserError: unknown sample_type.
    """
    rate = parse_sample_type(sample_type)
    if rate is not None:
        chosen = frames_at_rate(rate, length, fps)
        if len(chosen) > num_frames:
            chosen = chosen[np.linspace(0, len(chosen) - 1, num_frames).round().astype(np.int64)]
    else:
        edges = np.linspace(0, length, min(num_frames, length) + 1).astype(np.int64)
        if sample_type == "middle":
            chosen = (edges[:-1] + edges[1:] - 1) // 2
        else:
            assert numbers is not None
            chosen = edges[:-1] + (numbers[: len(edges) - 1] * np.diff(edges)).astype(np.int64)
    return np.concatenate([chosen, np.full(num_frames - len(chosen), chosen[-1], np.int64)])


def random_frames(num_frames: int, lengths: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """`choose_frames("rand", ...)` of B clips at once: (B, num_frames) of lengths (B,) and numbers (B, num_frames)."""
    edges = np.linspace(0, lengths, num_frames + 1, axis=1).astype(np.int64)
    chosen = edges[:, :-1] + (numbers * np.diff(edges, axis=1)).astype(np.int64)
    for row in np.flatnonzero(lengths < num_frames).tolist():
        chosen[row] = choose_frames("rand", num_frames, int(lengths[row]), 1.0, numbers[row])
    return chosen


def parse_sample_type(sample_type: str) -> float | None:
    """X of `fpsX`, None for `rand` and `middle`; raises UserError for anything else."""
    if sample_type in ("rand", "middle"):
        return None
    with suppress(ValueError):
        if sample_type.startswith("fps") and (rate := float(sample_type[3:])) > 0:
            return rate
    raise UserError(f"sample_type is {sample_type!r}, must be rand, middle or fpsX with X above 0, such as fps0.5")


def frames_at_rate(rate: float, length: int, fps: float) -> np.ndarray:
    """Indices of the frames nearest to 1/2X, 3/2X, 5/2X ... seconds; the middle one if there is none."""
    seconds = np.arange(0.5 / rate, length / fps + 0.5 / rate, 1 / rate)
    found = np.around(seconds * fps).astype(np.int64)
    found = found[found < length]
    return found if len(found) else np.array([length // 2], np.int64)


def random_windows(heights: np.ndarray, widths: np.ndarray, keys: np.ndarray, flip: bool) -> list[Window]:
    """A random resized crop (area 0.5-1, aspect 3/4-4/3) of each of B frames and, if wanted, a flip for half of them.

    heights, widths: (B,) pixels; keys: (B,) of `sample_keys`. Where none of ten crops fits, it is the middle one.
    """
    mirrored = (random_numbers(keys, FLIP, 1)[:, 0] < 0.5) & flip
    w = np.where(widths > heights, np.minimum(widths, np.rint(heights * CROP_ASPECT[1])), widths)
    h = np.where(heights >= widths, np.minimum(heights, np.rint(widths / CROP_ASPECT[0])), heights)
    middle = np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=1)
    # All tries at once, (B, CROP_TRIES): for a batch the calls cost more than the numbers.
    numbers = random_numbers(keys, CROP, 4 * CROP_TRIES).reshape(len(keys), CROP_TRIES, 4)
    for_area, for_aspect, for_top, for_left = np.moveaxis(numbers, 2, 0)
    height, width = heights[:, None], widths[:, None]
    area = height * width * (CROP_AREA[0] + for_area * (CROP_AREA[1] - CROP_AREA[0]))
    aspect = CROP_ASPECT[0] * (CROP_ASPECT[1] / CROP_ASPECT[0]) ** for_aspect  # uniform in the logarithm
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    tries = np.stack([for_top * (height - h + 1), for_left * (width - w + 1), h, w], axis=2)  # (B, CROP_TRIES, 4)
    first = tries[np.arange(len(keys)), fits.argmax(axis=1)]
    boxes = np.where(fits.any(axis=1, keepdims=True), first, middle).astype(np.int64)
    return list(map(Window, *boxes.T.tolist(), mirrored.tolist()))


def sample_keys(
    seed: int, corpora: np.ndarray, shards: np.ndarray, units: np.ndarray, traversals: np.ndarray
) -> np.ndarray:
    """(B,) uint64: the key of all random choices for a sample in one traversal of its corpus; arrays (B,)."""
    key = scrambled(np.full(len(units), seed, np.uint64) + GOLDEN)
    for part in (corpora, shards, units, traversals):
        key = scrambled((key + GOLDEN) ^ np.asarray(part).astype(np.uint64))
    return key


def random_numbers(keys: np.ndarray, first: int, count: int) -> np.ndarray:
    """Numbers `first` to `first + count` of the random sequence of each key, (B, count) float64 in [0, 1)."""
    counters = np.arange(first + 1, first + count + 1, dtype=np.uint64) * GOLDEN
    return (scrambled(keys[:, None] + counters) >> np.uint64(11)) * 2.0**-53


def scrambled(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: one-to-one, and each bit of the argument changes half of the result's."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
