"""One line of units over all corpora of a media type: from a position of the epoch to a sample's bytes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from loaders.config import LoaderConfig
from loaders.decode.pixels import Clip
from loaders.descriptions import turned
from loaders.index import Record, ShardIndex
from loaders.order.choices import (
    FRAMES,
    TEXT,
    BadSampleError,
    Window,
    check_sample_type,
    choose_frames,
    random_frames,
    random_numbers,
    random_windows,
    sample_keys,
)
from loaders.order.epoch import EpochPlan
from loaders.shards import CorpusReader
from runtime.errors import UserError

TRAINING_UNITS = ("samples", "captions", "questions")
IMAGE_FRAMES = np.zeros(1, np.int64)


@dataclass(slots=True)  # not frozen: those take twice as long to make
class SampleSpec:
    """A unit of the line and what is shown of it this time: frames (T,), window, its text or its question's answers."""

    name: str  # corpus and key, as logs show it
    corpus: int
    shard: int
    row: int
    record: Record
    frames: np.ndarray
    window: Window
    text: str
    answers: tuple[tuple[str, float], ...]  # with their weights
    fault: str = ""  # why it cannot be used, as its index already tells

    @property
    def visual(self) -> int:
        """A number that is the same for all units of one image or video."""
        return (self.corpus << 56) | (self.shard << 32) | self.row

    @property
    def pixels(self) -> tuple[str, bytes]:
        """What decides whether its pixels can be had: the sample and the frames."""
        return self.name, self.frames.tobytes()

    def clip(self, jpegs: list[bytes]) -> Clip:
        """What the decoder gets."""
        return Clip(jpegs, self.record.height, self.record.width, self.window)


class Mixture:
    """All corpora of one media type, as one sequence of units.

    place: in [0, 1), where this process begins in a list of indices that others may need as well.
    """

    def __init__(
        self,
        media_type: str,
        readers: Sequence[CorpusReader],
        config: LoaderConfig,
        pool: ThreadPoolExecutor,
        place: float = 0.0,
    ) -> None:
        if config.epoch_unit not in TRAINING_UNITS:
            raise UserError(f"epoch_unit is {config.epoch_unit!r}, must be one of {', '.join(TRAINING_UNITS)}")
        check_sample_type(config.video_input.sample_type)
        self.media_type, self.readers, self.config, self.pool, self.place = media_type, readers, config, pool, place
        self.shards = [
            (number, shard) for number, reader in enumerate(readers) for shard in range(len(reader.corpus.shards))
        ]
        self.counts = tuple(count for reader in readers for count in reader.corpus.counts(config.epoch_unit))
        self.weights = tuple(float(config.corpus_weights.get(reader.corpus.name, 1.0)) for reader in readers)
        text_kind = "questions" if config.epoch_unit == "questions" else "captions"
        for reader in readers:
            if not sum(reader.corpus.counts(text_kind)):
                raise UserError(f"{reader.corpus.url} holds no {text_kind}: this task cannot train on it")
        self.units = self.plan(0).units  # in every epoch
        self._places = np.array(self.shards, np.int64).reshape(-1, 2)  # (S, 2) corpus and shard

    def plan(self, epoch: int) -> EpochPlan:
        """The order of an epoch."""
        corpora = tuple(len(reader.corpus.shards) for reader in self.readers)
        config = self.config
        return EpochPlan(
            self.counts, config.seed, epoch, config.stripes, config.window_shards, corpora, weights=self.weights
        )

    def draw(self, plan: EpochPlan, positions: np.ndarray) -> list[SampleSpec]:
        """The samples at positions (P,) of the epoch; what is random about one, only it and the pass decide."""
        places, units, passes = plan.at(positions)
        indices = self._indices(places)
        mine = [indices[place] for place in places.tolist()]
        rows = [index.locate(self.config.epoch_unit, unit) for index, unit in zip(mine, units.tolist(), strict=True)]
        corpora, shards = self._places[places].T
        keys = sample_keys(self.config.seed, corpora, shards, units, passes)
        records = [index.record(row) for index, (row, _) in zip(mine, rows, strict=True)]
        return [
            self._draw(int(corpus), int(shard), index, row, text, *parts)
            for corpus, shard, index, (row, text), *parts in zip(
                corpora, shards, mine, rows, records, self._frames(records, keys), self._windows(records, keys),
                random_numbers(keys, TEXT, 1)[:, 0].tolist(), strict=True,
            )
        ]  # fmt: skip

    def _indices(self, places: np.ndarray) -> dict[int, ShardIndex]:
        """The indices of the line's shards of these numbers; those not in memory are loaded side by side."""
        wanted = [(place, *self.shards[place]) for place in set(places.tolist())]
        absent = [(corpus, shard) for _, corpus, shard in wanted if not self.readers[corpus].has_index(shard)]
        if absent:
            in_turn = turned(sorted(absent), self.place)
            list(self.pool.map(lambda pair: self.readers[pair[0]].index(pair[1]), in_turn))
        return {place: self.readers[corpus].index(shard) for place, corpus, shard in wanted}

    def _frames(self, records: Sequence[Record], keys: np.ndarray) -> Sequence[np.ndarray]:
        """Which frames of each sample are shown, (T,) each."""
        if self.media_type == "image":
            return [IMAGE_FRAMES] * len(records)
        video = self.config.video_input
        lengths = np.array([max(1, len(record.sizes)) for record in records])
        if video.sample_type == "rand":
            return list(random_frames(video.num_frames, lengths, random_numbers(keys, FRAMES, video.num_frames)))
        return [
            choose_frames(video.sample_type, video.num_frames, length, record.fps)
            for length, record in zip(lengths.tolist(), records, strict=True)
        ]

    def _windows(self, records: Sequence[Record], keys: np.ndarray) -> list[Window]:
        """The part of each sample's frames that is shown."""
        if not self.config.augment:
            return [Window(0, 0, record.height, record.width) for record in records]
        heights, widths = (np.array([getattr(record, side) for record in records]) for side in ("height", "width"))
        return random_windows(heights, widths, keys, self.config.flip)

    def _draw(
        self,
        corpus: int,
        shard: int,
        index: ShardIndex,
        row: int,
        text: int,
        record: Record,
        frames: np.ndarray,
        window: Window,
        number: float,
    ) -> SampleSpec:
        """A draw with its texts; number: a random one in [0, 1) that chooses among captions."""
        unit, fault, shown = self.config.epoch_unit, "", ""
        answers: tuple[tuple[str, float], ...] = ()
        if unit == "questions":
            question = index.text("questions", row, text)
            answers = tuple(zip(question["answers"], question["weights"], strict=True))
            shown, fault = question["question"], "" if answers else "its question has no answer"
        elif not index.text_count("captions", row):
            fault = "it has no caption"
        elif self.config.paragraph:
            shown = " ".join(index.texts("captions", row))
        else:
            chosen = text if unit == "captions" else int(number * index.text_count("captions", row))
            shown = index.text("captions", row, chosen)
        if not len(record.sizes) or min(record.height, record.width) < 1:
            fault = f"{len(record.sizes)} frames of {record.width}x{record.height} pixels in the index"
        name = f"{self.readers[corpus].corpus.name}/{record.key}"
        return SampleSpec(name, corpus, shard, row, record, frames, window, shown, answers, fault)

    def read(self, draws: Sequence[SampleSpec]) -> list[list[bytes] | BadSampleError]:
        """The frames' JPEG bytes of each draw, or why there are none."""
        found: list[list[bytes] | BadSampleError]
        found = [BadSampleError(draw.fault) if draw.fault else [] for draw in draws]
        for number, reader in enumerate(self.readers):
            rows = [row for row, draw in enumerate(draws) if draw.corpus == number and not draw.fault]
            wanted = [(draws[row].shard, draws[row].record, draws[row].frames) for row in rows]
            for row, jpegs in zip(rows, reader.read(wanted), strict=True):
                found[row] = jpegs
        return found

    def cancel(self) -> None:
        """Break off what is being read from stores."""
        for reader in self.readers:
            reader.cancel()

    def close(self) -> None:
        """Close the readers."""
        for reader in self.readers:
            reader.close()
