"""One line of units over all corpora of a media type: from a position of the epoch to a sample's bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loaders.clips import Window, choose_frames, clip_generator, random_window
from loaders.config import LoaderConfig
from loaders.decoding import Clip
from loaders.index import UNITS
from loaders.plan import EpochPlan
from loaders.storage import CorpusReader


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
class Fetched:
    """A sample with its bytes and its text, or its question's answers and their weights."""

    sample: Sample
    clip: Clip
    text: str
    answers: tuple[tuple[str, float], ...] = ()


class Line:
    """All corpora of one media type, as one sequence of units."""

    def __init__(self, media_type: str, readers: Sequence[CorpusReader], config: LoaderConfig) -> None:
        if config.unit not in UNITS:
            raise ValueError(f"unit is {config.unit!r}, must be one of {', '.join(UNITS)}")
        self.media_type, self.readers, self.config = media_type, readers, config
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
        return [self._sample(int(place), int(unit)) for place, unit in zip(*plan.at(positions), strict=True)]

    def _sample(self, place: int, unit: int) -> Sample:
        corpus, shard = self.shards[place]
        reader = self.readers[corpus]
        index = reader.index(shard)
        row, text = index.locate(self.config.unit, unit)
        return Sample(corpus, shard, unit, row, text, f"{reader.corpus.name}/{index.key(row)}")

    def fetch(self, sample: Sample, epoch: int) -> Fetched:
        """Draw what is random about a sample, and read the bytes it needs.

        Raises:
            BadSampleError: the bytes are not those that were packed.
        """
        reader = self.readers[sample.corpus]
        index = reader.index(sample.shard)
        record = index.record(sample.row)
        rng = clip_generator(self.config.seed, epoch, sample.corpus, sample.shard, sample.unit)
        video = self.config.video_input
        frames = np.zeros(1, np.int64)
        if self.media_type == "video":
            frames = choose_frames(video.sample_type, video.num_frames, len(record.sizes), record.fps, rng)
        window = Window(0, 0, record.height, record.width)
        if self.config.augment:
            window = random_window(record.height, record.width, rng, self.config.flip)
        jpegs = reader.frames(sample.shard, record, frames)
        clip = Clip(jpegs, record.height, record.width, window)
        if self.config.unit == "questions":
            question = index.texts("questions", sample.row)[sample.text]
            answers = tuple(zip(question["answers"], question["weights"], strict=True))
            return Fetched(sample, clip, question["question"], answers)
        captions = index.texts("captions", sample.row)
        if self.config.paragraph:
            return Fetched(sample, clip, " ".join(captions))
        number = sample.text if self.config.unit == "captions" else int(rng.integers(len(captions)))
        return Fetched(sample, clip, captions[number])

    def close(self) -> None:
        """Close the readers."""
        for reader in self.readers:
            reader.close()
