"""Test sets: every visual (image or video) exactly once over all ranks, with its texts, questions or options."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from loaders.config import LoaderConfig
from loaders.decode.choice import make_decoder
from loaders.decode.decoder import Decoder, decode_samples
from loaders.index import ShardIndex
from loaders.prefetch import Prefetcher
from loaders.samples import SampleSpec, whole_sample
from loaders.shards import open_corpus
from preprocessing.frames import choose_frames, frame_sampler
from preprocessing.text import clean_text
from runtime.activity import progress
from runtime.errors import UserError
from runtime.ranks import cores_per_process, current_ranks, processes_on_node
from sharding.shards.schema import Corpus


@dataclass(frozen=True)
class VisualBatch:
    """Visuals to encode: frames (B, T, S, S, 3) uint8, their numbers in the set (B,) int64, their keys."""

    frames: torch.Tensor
    indices: torch.Tensor
    keys: tuple[str, ...]


class VisualSet:
    """The visuals of a packed corpus in the order of its shards; `missing` holds the reasons of those without pixels.

    Raises FileNotFoundError, ValueError: as `sharding.shards.schema.read_corpus`; or no such sample_type_test.
    """

    def __init__(self, url: str, config: LoaderConfig) -> None:
        frame_sampler(config.video_input.sample_type_test)  # raises where there is none
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
        self._originals: dict[str, str] = {}  # cleaned -> as the corpus has it

    def cleaned(self, text: str) -> str:
        """A text of the corpus as results show it, with which `as_written` finds it again."""
        result = clean_text(text)
        self._originals.setdefault(result, text)
        return result

    def as_written(self, texts: Iterable[str], clean: Callable[[str], str]) -> list[str]:
        """Cleaned texts of the corpus, cleaned in the way of another encoder instead; other texts as they are."""
        return [clean(self._originals[text]) if text in self._originals else text for text in texts]

    @property
    def digest(self) -> str:
        """A name for the contents of the corpus, whose description holds all checksums."""
        return corpus_digest(self.reader.corpus)

    def locate(self, visual: int) -> tuple[int, int]:
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
        self, num_frames: int, batch_size: int, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"
    ) -> Iterator[VisualBatch]:
        """This rank's visuals (those = rank mod world size), `batch_size` at once, prefetched by a thread.

        device: where they are used. decode=auto is the CPU path here: the two decoders' pictures differ a little, and
        metrics must not depend on which was faster.
        """
        config = self.config
        threads = config.threads or cores_per_process(processes_on_node(world_size))
        decoder = make_decoder(
            config.decode, config.image_res, threads, config.antialias, torch.device(device), deterministic=True
        )
        mine = np.arange(rank, self.num_visuals, world_size)
        parts = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
        prefetcher = Prefetcher(
            (self._batch(decoder, part, num_frames) for part in parts), config.prefetch, "loader-evaluation"
        )
        try:
            yield from (batch for batch in prefetcher if len(batch.keys))
        finally:
            prefetcher.close()
            decoder.close()

    def _batch(self, decoder: Decoder, visuals: np.ndarray, num_frames: int) -> VisualBatch:
        samples = decode_samples(decoder, self.reader.read([self._spec(v, num_frames) for v in visuals.tolist()]))
        self.missing.update({int(visuals[row]): reason for row, reason in samples.reasons.items()})
        rows = [row for row in range(len(visuals)) if row not in samples.reasons]
        frames = samples.frames[torch.tensor(rows, dtype=torch.int64)] if samples.reasons else samples.frames
        keys = tuple(samples.specs[row].record.key for row in rows)
        return VisualBatch(frames, torch.from_numpy(visuals[rows]), keys)

    def _spec(self, visual: int, num_frames: int) -> SampleSpec:
        """A visual and which of its frames are shown; images have one, whatever `num_frames` is."""
        shard, row = self.locate(visual)
        record = self.reader.index(shard).record(row)
        if self.media_type == "image":
            return whole_sample(record, np.zeros(1, np.int64))
        sample_type, length = self.config.video_input.sample_type_test, max(1, len(record.sizes))
        return whole_sample(record, choose_frames(sample_type, num_frames, length, record.fps))

    def thumbnail(self, visual: int, num_frames: int = 4) -> list[bytes]:
        """JPEG bytes of a visual's frames, for reports; empty when they cannot be read."""
        (sample,) = self.reader.read([self._spec(visual, num_frames)])
        return list(sample.jpegs)

    def close(self) -> None:
        """Close the files."""
        self.reader.close()


def corpus_digest(corpus: Corpus) -> str:
    """A name for the contents of a corpus, wherever it is."""
    return hashlib.sha256(corpus.to_json().encode()).hexdigest()


class RetrievalSet(VisualSet):
    """Visuals and the distinct texts that describe them.

    paragraph: all captions of a visual are joined by one space and count as one text (DiDeMo, ActivityNet).
    texts: cleaned, in order of first appearance; visuals_of_text[i] and texts_of_visual[j] list the true pairs.
    """

    def __init__(self, url: str, config: LoaderConfig, paragraph: bool = False) -> None:
        super().__init__(url, config)
        if not sum(self.reader.corpus.counts("captions")):
            raise UserError(f"{url} has no captions: it is not a retrieval set")
        numbers: dict[str, int] = {}
        self.texts: list[str] = []
        self.visuals_of_text: list[list[int]] = []
        self.texts_of_visual: list[list[int]] = []
        for visual, (index, row) in enumerate(self.rows()):
            captions = index.texts("captions", row)
            captions = [" ".join(captions)] if paragraph else captions
            mine = sorted({numbers.setdefault(text, len(numbers)) for text in map(self.cleaned, captions)})
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
                self.cleaned(item["question"]),
                tuple(item["answers"]),
                tuple(item["weights"]),
                item["question_type"],
                item["answer_type"],
            )
            for visual, (index, row) in enumerate(self.rows())
            for item in index.texts("questions", row)
        ]
        if not self.questions:
            raise UserError(f"{url} has no questions: it is not a question-answering set")


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
            Choice(visual, item["question_id"], tuple(map(self.cleaned, item["options"])), item["answer"])
            for visual, (index, row) in enumerate(self.rows())
            for item in index.texts("choices", row)
        ]
        if not self.choices:
            raise UserError(f"{url} has no options: it is not a multiple-choice set")
