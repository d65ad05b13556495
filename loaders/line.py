"""One line of units over all corpora of a media type: from a position of the epoch to a sample's bytes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from loaders.clips import Window, check_sample_type, choose_frames, clip_generator, random_window
from loaders.config import LoaderConfig
from loaders.decoding import Clip
from loaders.index import UNITS, Record
from loaders.plan import EpochPlan
from loaders.storage import BadSampleError, CorpusReader

DRAWS_A_READ = 32  # samples whose bytes one thread reads; a remote store is asked for all of them at once


@dataclass(frozen=True)
class Sample:
    """A unit of the line, found: which corpus, shard and row, and which of the row's texts."""

    corpus: int
    shard: int
    unit: int
    row: int
    text: int
    name: str  # corpus and key, as logs show it

    @property
    def visual(self) -> int:
        """A number that is the same for all units of one image or video."""
        return (self.corpus << 56) | (self.shard << 32) | self.row


@dataclass(frozen=True)
class Draw:
    """What is shown of a sample in an epoch: frames (T,), window, and its text or its question's answers."""

    sample: Sample
    record: Record
    frames: np.ndarray
    window: Window
    text: str
    answers: tuple[tuple[str, float], ...] = ()  # with their weights

    @property
    def name(self) -> tuple[str, bytes]:
        """What decides whether its pixels can be had: the sample and the frames."""
        return self.sample.name, self.frames.tobytes()

    def clip(self, jpegs: list[bytes]) -> Clip:
        """What the decoder gets."""
        return Clip(jpegs, self.record.height, self.record.width, self.window)


class Line:
    """All corpora of one media type, as one sequence of units."""

    def __init__(
        self, media_type: str, readers: Sequence[CorpusReader], config: LoaderConfig, pool: ThreadPoolExecutor
    ) -> None:
        if config.unit not in UNITS:
            raise ValueError(f"unit is {config.unit!r}, must be one of {', '.join(UNITS)}")
        check_sample_type(config.video_input.sample_type)
        self.media_type, self.readers, self.config, self.pool = media_type, readers, config, pool
        self.shards = [
            (number, shard) for number, reader in enumerate(readers) for shard in range(len(reader.corpus.shards))
        ]
        self.counts = tuple(count for reader in readers for count in reader.corpus.counts(config.unit))
        text_kind = "questions" if config.unit == "questions" else "captions"
        for reader in readers:
            if not sum(reader.corpus.counts(text_kind)):
                raise ValueError(f"{reader.corpus.url} holds no {text_kind}: this task cannot train on it")

    def plan(self, epoch: int) -> EpochPlan:
        """The order of an epoch."""
        return EpochPlan(self.counts, self.config.seed, epoch, self.config.lanes, self.config.window_shards)

    def find(self, plan: EpochPlan, positions: np.ndarray) -> list[Sample]:
        """The samples at positions of the epoch."""
        shards, units = (values.tolist() for values in plan.at(positions))
        self._load_indices(set(shards))
        return [self._sample(place, unit) for place, unit in zip(shards, units, strict=True)]

    def _load_indices(self, places: set[int]) -> None:
        """Load the indices that are not in memory side by side."""
        absent = [(reader, shard) for reader, shard in map(self._shard, places) if not reader.has_index(shard)]
        list(self.pool.map(lambda pair: pair[0].index(pair[1]), absent))

    def _shard(self, place: int) -> tuple[CorpusReader, int]:
        corpus, shard = self.shards[place]
        return self.readers[corpus], shard

    def _sample(self, place: int, unit: int) -> Sample:
        corpus, shard = self.shards[place]
        index = self.readers[corpus].index(shard)
        row, text = index.locate(self.config.unit, unit)
        return Sample(corpus, shard, unit, row, text, f"{self.readers[corpus].corpus.name}/{index.key(row)}")

    def draw(self, sample: Sample, epoch: int) -> Draw:
        """Draw what is random about a sample, by a generator that only the sample and the epoch decide."""
        index = self.readers[sample.corpus].index(sample.shard)
        record = index.record(sample.row)
        rng = clip_generator(self.config.seed, epoch, sample.corpus, sample.shard, sample.unit)
        video = self.config.video_input
        frames = np.zeros(1, np.int64)
        if self.media_type == "video":
            frames = choose_frames(video.sample_type, video.num_frames, len(record.sizes), record.fps, rng)
        window = Window(0, 0, record.height, record.width)
        if self.config.augment:
            window = random_window(record.height, record.width, rng, self.config.flip)
        if self.config.unit == "questions":
            question = index.texts("questions", sample.row)[sample.text]
            answers = tuple(zip(question["answers"], question["weights"], strict=True))
            return Draw(sample, record, frames, window, question["question"], answers)
        captions = index.texts("captions", sample.row)
        if self.config.paragraph:
            return Draw(sample, record, frames, window, " ".join(captions))
        number = sample.text if self.config.unit == "captions" else int(rng.integers(len(captions)))
        return Draw(sample, record, frames, window, captions[number])

    def read(self, draws: Sequence[Draw]) -> list[list[bytes] | BadSampleError]:
        """The frames' JPEG bytes of each draw, or why there are none; read by several threads."""
        parts = [draws[first : first + DRAWS_A_READ] for first in range(0, len(draws), DRAWS_A_READ)]
        return [jpegs for part in self.pool.map(self._read_part, parts) for jpegs in part]

    def _read_part(self, draws: Sequence[Draw]) -> list[list[bytes] | BadSampleError]:
        found: list[list[bytes] | BadSampleError] = [[]] * len(draws)
        for number, reader in enumerate(self.readers):
            rows = [row for row, draw in enumerate(draws) if draw.sample.corpus == number]
            wanted = [(draws[row].sample.shard, draws[row].record, draws[row].frames) for row in rows]
            for row, jpegs in zip(rows, reader.read(wanted), strict=True):
                found[row] = jpegs
        return found

    def close(self) -> None:
        """Close the readers."""
        for reader in self.readers:
            reader.close()
