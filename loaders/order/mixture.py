"""Several corpora of one medium as one sequence: from positions of the epoch to samples, and to their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from loaders.config import LoaderConfig
from loaders.descriptions import rotated
from loaders.index import ShardIndex
from loaders.order.choices import random_choices, sample_keys
from loaders.order.epoch import EpochPlan
from loaders.samples import RawSample, SampleSpec
from loaders.shards import CorpusReader
from preprocessing.frames import frame_sampler
from runtime.errors import UserError

Answers = tuple[tuple[str, float], ...]  # with their weights


class Mixture:
    """All corpora of one medium, as one sequence of units.

    with_texts: samples come with texts; a corpus without the needed ones is an error then.
    start: in [0, 1), where this process begins in a list of indices that other processes may need as well.
    """

    def __init__(
        self,
        media_type: str,
        readers: Sequence[CorpusReader],
        config: LoaderConfig,
        pool: ThreadPoolExecutor,
        with_texts: bool = True,
        start: float = 0.0,
    ) -> None:
        frame_sampler(config.video_input.sample_type)  # raises where there is none
        self.media_type, self.readers, self.config = media_type, readers, config
        self._pool, self._with_texts, self._start = pool, with_texts, start
        self._video = config.video_input if media_type == "video" else None
        self.counts = tuple(count for reader in readers for count in reader.corpus.counts(config.epoch_unit))
        self.weights = tuple(float(config.corpus_weights.get(reader.corpus.name, 1.0)) for reader in readers)
        text_kind = "questions" if config.epoch_unit == "questions" else "captions"
        for reader in readers:
            if with_texts and not sum(reader.corpus.counts(text_kind)):
                raise UserError(f"{reader.corpus.url} has no {text_kind}: this task cannot train on it")
        self.units = self.plan(0).units  # in every epoch
        # (S, 2): corpus, and shard of the corpus, of each shard of the mixture
        self._shards = np.array(
            [(number, shard) for number, reader in enumerate(readers) for shard in range(len(reader.corpus.shards))],
            np.int64,
        ).reshape(-1, 2)

    def plan(self, epoch: int) -> EpochPlan:
        """The order of an epoch."""
        corpora, config = tuple(len(reader.corpus.shards) for reader in self.readers), self.config
        return EpochPlan(
            self.counts, config.seed, epoch, config.stripes, config.window_shards, corpora, weights=self.weights
        )

    def specs(self, plan: EpochPlan, positions: np.ndarray) -> list[SampleSpec]:
        """The samples at positions (P,) of the epoch. Only sample and traversal decide the random choices for one."""
        shards, units, traversals = plan.locate(positions)
        corpora, shards = self._shards[shards].T
        indices = self._indices(corpora, shards)
        rows = [index.locate(self.config.epoch_unit, unit) for index, unit in zip(indices, units.tolist(), strict=True)]
        records = [index.record(row) for index, (row, _) in zip(indices, rows, strict=True)]
        keys = sample_keys(self.config.seed, corpora, shards, units, traversals)
        choices = random_choices(records, keys, self._video, self.config)
        found = []
        for row, record in enumerate(records):
            name = f"{self.readers[corpora[row]].corpus.name}/{record.key}"
            text, answers, reason = self._text(indices[row], record.row, rows[row][1], choices.captions[row])
            frames, window, reason = choices.frames[row], choices.windows[row], record.reason or reason
            extra = indices[row].extra(record.row)
            own = int(corpora[row]), name, text, answers, reason, extra, int(keys[row])
            found.append(SampleSpec(record, frames, window, *own))
        return found

    def _indices(self, corpora: np.ndarray, shards: np.ndarray) -> list[ShardIndex]:
        """The index of each shard, given as arrays (P,); those not in memory are loaded side by side."""
        wanted = list(zip(corpora.tolist(), shards.tolist(), strict=True))
        absent = sorted({pair for pair in set(wanted) if not self.readers[pair[0]].has_index(pair[1])})
        if absent:
            list(self._pool.map(lambda pair: self.readers[pair[0]].index(pair[1]), rotated(absent, self._start)))
        found = {(corpus, shard): self.readers[corpus].index(shard) for corpus, shard in set(wanted)}
        return [found[pair] for pair in wanted]

    def _text(self, index: ShardIndex, row: int, number: int, caption: float) -> tuple[str, Answers, str]:
        """(text, answers, reason if there is none) of a row: its text `number`, or the caption chosen by `caption`."""
        if not self._with_texts:
            return "", (), ""
        if self.config.epoch_unit == "questions":
            question = index.text("questions", row, number)
            answers = tuple(zip(question["answers"], question["weights"], strict=True))
            return question["question"], answers, "" if answers else "its question has no answer"
        count = index.text_count("captions", row)
        if not count:
            return "", (), "it has no caption"
        if self.config.paragraph:
            return " ".join(index.texts("captions", row)), (), ""
        chosen = number if self.config.epoch_unit == "captions" else int(caption * count)
        return index.text("captions", row, chosen), (), ""

    def read(self, specs: Sequence[SampleSpec]) -> list[RawSample]:
        """The bytes of each sample's frames, or the reason why there are none."""
        found: dict[int, RawSample] = {}
        for number, reader in enumerate(self.readers):
            rows = [row for row, spec in enumerate(specs) if spec.corpus == number]
            found |= zip(rows, reader.read([specs[row] for row in rows]), strict=True)
        return [found[row] for row in range(len(specs))]
