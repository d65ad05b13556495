"""What of a sample a step sees: frames, crop, flip and caption, drawn by a counter-based generator."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import numpy as np

CROP_AREA = (0.5, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
CLIP = 4  # what a generator is for; part of its key
_own = threading.local()  # each thread's generator


@dataclass(frozen=True)
class Window:
    """The part of a frame that is shown, in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


def choose_frames(
    sample_type: str, num_frames: int, length: int, fps: float, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Indices (num_frames,) int64 of the frames to show of a clip of `length` frames stored at `fps` a second.

    `rand`: a random frame of each of num_frames equal intervals; `middle`: the middle one of each; `fpsX`: frames at
    X a second, spread evenly where they are more than num_frames. Where there are too few, the last is repeated.

    Raises:
        ValueError: unknown sample_type, or `rand` without a generator.
    """
    check_sample_type(sample_type)
    if sample_type.startswith("fps"):
        chosen = frames_at_rate(parse_rate(sample_type), length, fps)
        if len(chosen) > num_frames:
            chosen = chosen[np.linspace(0, len(chosen) - 1, num_frames).round().astype(np.int64)]
    else:
        edges = np.linspace(0, length, min(num_frames, length) + 1).astype(np.int64)
        if sample_type == "middle":
            chosen = (edges[:-1] + edges[1:] - 1) // 2
        elif sample_type == "rand" and rng is not None:
            chosen = rng.integers(edges[:-1], edges[1:])
        else:
            raise ValueError(f"sample_type is {sample_type!r}: without a generator it must be middle or fpsX")
    return np.concatenate([chosen, np.full(num_frames - len(chosen), chosen[-1], np.int64)])


def check_sample_type(sample_type: str) -> None:
    """Raise ValueError unless it is one that `choose_frames` knows."""
    if sample_type.startswith("fps"):
        parse_rate(sample_type)
    elif sample_type not in ("rand", "middle"):
        raise ValueError(f"sample_type is {sample_type!r}, must be rand, middle or fpsX such as fps2")


def parse_rate(sample_type: str) -> float:
    """X of `fpsX`; raises ValueError when it is no positive number."""
    try:
        rate = float(sample_type[3:])
    except ValueError:
        rate = 0.0
    if rate <= 0:
        raise ValueError(f"sample_type is {sample_type!r}: after fps stands a positive number, such as fps0.5")
    return rate


def frames_at_rate(rate: float, length: int, fps: float) -> np.ndarray:
    """Indices of the frames nearest to 1/2X, 3/2X, 5/2X ... seconds; the middle one where there is none."""
    seconds = np.arange(0.5 / rate, length / fps + 0.5 / rate, 1 / rate)
    found = np.around(seconds * fps).astype(np.int64)
    found = found[found < length]
    return found if len(found) else np.array([length // 2], np.int64)


def random_window(height: int, width: int, rng: np.random.Generator, flip: bool) -> Window:
    """A random resized crop (area 0.5-1, aspect 3/4-4/3) and, if wanted, a flip for half of all clips."""
    mirrored = bool(rng.random() < 0.5) and flip
    for _ in range(10):
        for_area, for_aspect, for_top, for_left = rng.random(4).tolist()
        area = height * width * (CROP_AREA[0] + for_area * (CROP_AREA[1] - CROP_AREA[0]))
        aspect = CROP_ASPECT[0] * (CROP_ASPECT[1] / CROP_ASPECT[0]) ** for_aspect  # uniform in the logarithm
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Window(int(for_top * (height - h + 1)), int(for_left * (width - w + 1)), h, w, mirrored)
    w = min(width, round(height * CROP_ASPECT[1])) if width > height else width
    h = min(height, round(width / CROP_ASPECT[0])) if height >= width else height
    return Window((height - h) // 2, (width - w) // 2, h, w, mirrored)


def clip_generator(seed: int, epoch: int, corpus: int, shard: int, unit: int) -> np.random.Generator:
    """The generator of everything random about one sample in one epoch; valid until the thread asks for the next.

    It is the thread's own one set to a state that the arguments decide: making a new one takes ten times as long.
    """
    if not hasattr(_own, "bits"):
        _own.bits = np.random.Philox(0)
        _own.generator = np.random.Generator(_own.bits)
        _own.state = {**_own.bits.state, "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}
    key = np.array([(seed << 20) ^ (epoch << 4) ^ CLIP, (corpus << 56) ^ (shard << 32) ^ unit], np.uint64)
    _own.bits.state = {**_own.state, "state": {"counter": np.zeros(4, np.uint64), "key": key}}
    return _own.generator
