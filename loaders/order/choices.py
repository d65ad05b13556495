"""Random choices for a sample: frames, crop, flip, caption and its words, by a counter-based generator."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from loaders.config import LoaderConfig, VideoInput
from loaders.index import Record
from loaders.samples import Window
from preprocessing.frames import choose_frames, random_frames

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
    records: Sequence[Record], keys: np.ndarray, video: VideoInput | None, config: LoaderConfig
) -> RandomChoices:
    """The choices for B samples with these keys (B,) of `sample_keys`; video is None for images, of one frame each."""
    heights, widths = (np.array([getattr(record, side) for record in records]) for side in ("height", "width"))
    windows = (
        random_windows(heights, widths, keys, config.flip, config.crop_area)
        if config.augment
        else [Window(0, 0, record.height, record.width) for record in records]
    )
    frames = [ONE_FRAME] * len(records) if video is None else clip_frames(records, keys, video)
    return RandomChoices(frames, windows, random_numbers(keys, TEXT, 1)[:, 0])


def clip_frames(records: Sequence[Record], keys: np.ndarray, video: VideoInput) -> list[np.ndarray]:
    """Indices of the sampled frames of each clip, (T,) each."""
    lengths = np.array([max(1, len(record.sizes)) for record in records])
    numbers = random_numbers(keys, FRAMES, video.num_frames)
    if video.sample_type == "rand":
        return list(random_frames(video.num_frames, lengths, numbers))
    return [
        choose_frames(video.sample_type, video.num_frames, length, record.fps, own)
        for length, record, own in zip(lengths.tolist(), records, numbers, strict=True)
    ]


def random_windows(
    heights: np.ndarray, widths: np.ndarray, keys: np.ndarray, flip: bool, least_area: float
) -> list[Window]:
    """A random resized crop (aspect 3/4-4/3) of each of B frames and, if wanted, a flip for half of them.

    heights, widths: (B,) pixels; keys: (B,) of `sample_keys`; least_area: of the crops, as a share of
    the frame; the largest is all of it. Where none of ten crops fits, it is the middle one.
    """
    mirrored = (random_numbers(keys, FLIP, 1)[:, 0] < 0.5) & flip
    w = np.where(widths > heights, np.minimum(widths, np.rint(heights * CROP_ASPECT[1])), widths)
    h = np.where(heights >= widths, np.minimum(heights, np.rint(widths / CROP_ASPECT[0])), heights)
    middle = np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=1)
    # All tries at once, (B, CROP_TRIES): for a batch the calls cost more than the numbers.
    numbers = random_numbers(keys, CROP, 4 * CROP_TRIES).reshape(len(keys), CROP_TRIES, 4)
    for_area, for_aspect, for_top, for_left = np.moveaxis(numbers, 2, 0)
    height, width = heights[:, None], widths[:, None]
    area = height * width * (least_area + for_area * (1 - least_area))
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


def own_numbers(keys: np.ndarray, name: str, count: int) -> np.ndarray:
    """Random numbers (B, count) float64 in [0, 1) of samples with these keys (B,) uint64, other ones for each name."""
    return random_numbers(scrambled(keys ^ np.uint64(zlib.crc32(name.encode()))), 0, count)


def without_words(text: str, key: int, share: float) -> str:
    """`text` without this share of its words, drawn by the sample's key; at least one is left."""
    words = text.split()
    numbers = own_numbers(np.array([key], np.uint64), "word_dropout", len(words))[0]
    kept = numbers >= min(share, numbers.max(initial=0))
    return " ".join(word for word, keep in zip(words, kept, strict=True) if keep)


def scrambled(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: one-to-one, and each bit of the argument changes half of the result's."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
