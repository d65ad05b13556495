"""Test sets: every visual exactly once over all ranks, with the texts, questions or options that go with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from loaders.config import LoaderConfig
from loaders.decode.decoder import Decoder, make_decoder, usable_threads
from loaders.decode.pixels import Clip
from loaders.index import Record, ShardIndex
from loaders.order.choices import BadSampleError, Window, check_sample_type, choose_frames
from loaders.prefetch import Prefetcher
from loaders.shards import open_corpus
from loaders.text import clean_text
from runtime.activity import progress
from runtime.errors import UserError
from runtime.ranks import current_ranks, processes_on_node
from sharding.shards.schema import Corpus


@dataclass(frozen=True)
class VisualBatch:
    """Visuals to encode: frames (B, T, S, S, 3) uint8, their numbers in the set (B,) int64, their keys."""

    frames: torch.Tensor
    indices: torch.Tensor
    keys: tuple[str, ...]


class VisualSet:
    """The visuals of a packed corpus in the order of its shards; `missing` lists those that do not decode.

    Raises:
        FileNotFoundError, ValueError: as `sharding.shards.schema.read_corpus`; or no such sample_type_test.
    """

    def __init__(self, url: str, config: LoaderConfig) -> None:
        check_sample_type(config.video_input.sample_type_test)
        if config.video_input.sample_type_test == "rand":
            raise UserError(
                "sample_type_test is 'rand', but test sets show the same frames each time: set middle or fpsX"
            )
        self.reader = open_corpus(url, config)
        self.config = config
        self.name, self.media_type = self.reader.corpus.name, self.reader.corpus.media_type
        self.num_visuals = self.reader.corpus.samples
        self._first = np.concatenate([[0], np.cumsum(self.reader.corpus.counts())])
        self.missing: dict[int, str] = {}

    @property
    def digest(self) -> str:
        """A name for the corpus' contents, which its description holds the checksums of."""
        return corpus_digest(self.reader.corpus)

    def place(self, visual: int) -> tuple[int, int]:
        """(shard, row) of a visual."""
        shard = int(np.searchsorted(self._first, visual, side="right")) - 1
        return shard, visual - int(self._first[shard])

    def rows(self) -> Iterator[tuple[ShardIndex, int]]:
        """(index, row) of every visual, in order."""
        self.reader.bring_indices(current_ranks().offset)
        shards = len(self.reader.corpus.shards)
        for shard in range(shards):
            progress(f"reading the index of shard {shard} of {shards}")
            index = self.reader.index(shard)
            yield from ((index, row) for row in range(len(index)))

    @cached_property
    def sources(self) -> list[str]:
        """The media's names in the annotations."""
        return [index.source(row) for index, row in self.rows()]

    def batches(
        self,
        num_frames: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> Iterator[VisualBatch]:
        """This rank's visuals (those = rank mod world size), `batch_size` at once, made ahead by a thread.

        device: where they are used. decode=auto is the CPU path here: the two decoders' pictures differ a little, and
        metrics must not depend on which was faster.
        """
        config = self.config
        threads = usable_threads(config.threads, processes_on_node(world_size))
        decoder = make_decoder(
            config.decode, config.image_res, threads, config.antialias, torch.device(device), deterministic=True
        )
        mine = np.arange(rank, self.num_visuals, world_size)
        parts = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
        ahead = Prefetcher(
            (self._batch(decoder, part, num_frames) for part in parts), config.prefetch, "loader-evaluation"
        )
        try:
            yield from (batch for batch in ahead if len(batch.keys))
        finally:
            ahead.close()
            decoder.close()

    def _batch(self, decoder: Decoder, visuals: np.ndarray, num_frames: int) -> VisualBatch:
        found: list[tuple[int, Clip]] = []
        records = [self._record(visual, num_frames) for visual in visuals.tolist()]
        for visual, (_, record, _), jpegs in zip(visuals.tolist(), records, self.reader.read(records), strict=True):
            if isinstance(jpegs, BadSampleError):
                self.missing[visual] = str(jpegs)
            else:
                found.append((visual, whole_clip(record, jpegs)))
        if not found:
            return VisualBatch(torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), ())
        frames, bad = decoder.decode([clip for _, clip in found])
        self.missing.update({found[number][0]: reason for number, reason in bad.items()})
        if bad:
            found = [pair for number, pair in enumerate(found) if number not in bad]
            frames = frames[
                torch.tensor([number for number in range(len(frames)) if number not in bad], dtype=torch.int64)
            ]
        keys = dict(zip(visuals.tolist(), (record.key for _, record, _ in records), strict=True))
        indices = torch.tensor([visual for visual, _ in found], dtype=torch.int64)
        return VisualBatch(frames, indices, tuple(keys[visual] for visual, _ in found))

    def _record(self, visual: int, num_frames: int) -> tuple[int, Record, np.ndarray]:
        """A visual's shard, its place there, and which of its frames are shown."""
        shard, row = self.place(visual)
        record = self.reader.index(shard).record(row)
        return shard, record, self.frame_numbers(len(record.sizes), record.fps, num_frames)

    def frame_numbers(self, length: int, fps: float, num_frames: int) -> np.ndarray:
        """Which stored frames are shown; images have one, whatever `num_frames` is."""
        if self.media_type == "image":
            return np.zeros(1, np.int64)
        return choose_frames(self.config.video_input.sample_type_test, num_frames, length, fps)

    def thumbnail(self, visual: int, num_frames: int = 4) -> list[bytes]:
        """JPEG bytes of a visual's frames, for reports; empty when they cannot be read."""
        (jpegs,) = self.reader.read([self._record(visual, num_frames)])
        return [] if isinstance(jpegs, BadSampleError) else jpegs

    def close(self) -> None:
        """Close the files."""
        self.reader.close()


def corpus_digest(corpus: Corpus) -> str:
    """A name for a corpus' contents, wherever it lies."""
    return hashlib.sha256(corpus.to_json().encode()).hexdigest()


def whole_clip(record: Record, jpegs: list[bytes]) -> Clip:
    """A clip of which everything is shown, whatever its aspect."""
    return Clip(jpegs, record.height, record.width, Window(0, 0, record.height, record.width))


class RetrievalSet(VisualSet):
    """Visuals and the distinct texts that describe them.

    paragraph: all captions of a visual are joined by one space and count as one text (DiDeMo, ActivityNet).
    texts: cleaned, in order of first appearance; visuals_of_text[i] and texts_of_visual[j] list the true pairs.
    """

    def __init__(self, url: str, config: LoaderConfig, paragraph: bool = False) -> None:
        super().__init__(url, config)
        if not sum(self.reader.corpus.counts("captions")):
            raise UserError(f"{url} holds no captions: it is no retrieval set")
        numbers: dict[str, int] = {}
        self.texts: list[str] = []
        self.visuals_of_text: list[list[int]] = []
        self.texts_of_visual: list[list[int]] = []
        for visual, (index, row) in enumerate(self.rows()):
            captions = index.texts("captions", row)
            captions = [" ".join(captions)] if paragraph else captions
            mine = sorted({numbers.setdefault(text, len(numbers)) for text in map(clean_text, captions)})
            self.texts_of_visual.append(mine)
            for text in mine:
                if text == len(self.visuals_of_text):
                    self.visuals_of_text.append([])
                self.visuals_of_text[text].append(visual)
        self.texts = list(numbers)


@dataclass(frozen=True)
class Question:
    """A question about a visual, with its accepted answers and their shares."""

    visual: int
    question_id: str
    question: str
    answers: tuple[str, ...]
    weights: tuple[float, ...]
    question_type: str
    answer_type: str


class QASet(VisualSet):
    """Visuals and the questions about them, in the order of the shards."""

    def __init__(self, url: str, config: LoaderConfig) -> None:
        super().__init__(url, config)
        self.questions = [
            Question(
                visual,
                item["question_id"],
                clean_text(item["question"]),
                tuple(item["answers"]),
                tuple(item["weights"]),
                item["question_type"],
                item["answer_type"],
            )
            for visual, (index, row) in enumerate(self.rows())
            for item in index.texts("questions", row)
        ]
        if not self.questions:
            raise UserError(f"{url} holds no questions: it is no question-answering set")


@dataclass(frozen=True)
class Choice:
    """A visual and the texts of which one describes it."""

    visual: int
    question_id: str
    options: tuple[str, ...]
    answer: int


class ChoiceSet(VisualSet):
    """Visuals and their multiple-choice options."""

    def __init__(self, url: str, config: LoaderConfig) -> None:
        super().__init__(url, config)
        self.choices = [
            Choice(visual, item["question_id"], tuple(map(clean_text, item["options"])), item["answer"])
            for visual, (index, row) in enumerate(self.rows())
            for item in index.texts("choices", row)
        ]
        if not self.choices:
            raise UserError(f"{url} holds no options: it is no multiple-choice set")
