"""The training loader: an epoch's batches in order, made ahead of the step by threads."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from loaders.batch import Answers, Batch
from loaders.config import LoaderConfig
from loaders.decoding import make_decoder, usable_threads
from loaders.line import Fetched, Line, Sample
from loaders.plan import EpochPlan, check_world_size, media_schedule, rank_positions
from loaders.storage import BadSampleError, CorpusReader
from loaders.text import Tokenizer, clean_text

log = logging.getLogger("loaders")

MAX_REPLACEMENTS = 64  # tries for one sample before the loader gives up
ENOUGH_TO_JUDGE = 200  # samples read before the share of bad ones is looked at
ANSWER_LENGTH = {"image": 6, "video": 5}
QUESTION_LENGTH = 25


class TrainLoader:
    """Batches of images and videos, exactly once an epoch over all ranks, the same for any number of ranks.

    Iterating gives the rest of the current epoch; `state_dict` is (epoch, step) and resuming costs nothing.

    Raises:
        FileNotFoundError, ValueError: a corpus is missing, of another version or without the needed texts; a batch
            size does not fit the world size; a setting is unknown.
    """

    def __init__(
        self,
        corpora: Sequence[str],
        tokenizer: Tokenizer,
        config: LoaderConfig,
        rank: int = 0,
        world_size: int = 1,
        ranks_here: int | None = None,
    ) -> None:
        if not corpora:
            raise ValueError("train_corpus is empty: name at least one packed corpus")
        self.config, self.tokenizer, self.rank, self.world_size = config, tokenizer, rank, world_size
        readers = [CorpusReader(url, config.storage) for url in corpora]
        kinds = sorted({reader.corpus.media_type for reader in readers})
        self.lines = {kind: Line(kind, [r for r in readers if r.corpus.media_type == kind], config) for kind in kinds}
        self.batch_size = {kind: getattr(config.batch_size, kind) for kind in kinds}
        self.media_steps: dict[str, int] = {}
        for kind, line in self.lines.items():
            check_world_size(self.batch_size[kind], world_size, kind)
            self.media_steps[kind] = sum(line.counts) // self.batch_size[kind]
            if not self.media_steps[kind]:
                raise ValueError(
                    f"batch_size.{kind}={self.batch_size[kind]} is more than the {sum(line.counts)} "
                    f"{config.unit} there are: choose a smaller one"
                )
        threads = usable_threads(config.threads, ranks_here or world_size)
        self.decoder = make_decoder(config.decode, config.image_res, threads, config.antialias)
        self.pool = ThreadPoolExecutor(max(2, threads), thread_name_prefix="read")
        self.counters: dict[str, float] = defaultdict(float)
        self.quarantine: dict[str, str] = {}
        self.next_epoch, self.next_step = 0, 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch; what does not fill a batch is left out, other samples each epoch."""
        return sum(self.media_steps.values())

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch; the next iteration is the next epoch."""
        yield from self.epoch(self.next_epoch, self.next_step)

    def state_dict(self) -> dict[str, int]:
        """Where the next batch is; O(1), valid on any world size that divides the batch sizes."""
        return {"epoch": self.next_epoch, "step": self.next_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state_dict()`."""
        self.next_epoch, self.next_step = int(state["epoch"]), int(state["step"])

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches start_step, start_step + 1 ... of an epoch, made by a thread at most `prefetch` ahead."""
        ahead: queue.Queue[Any] = queue.Queue(maxsize=max(1, self.config.prefetch))
        stop = threading.Event()
        producer = threading.Thread(
            target=self._produce, args=(epoch, start_step, ahead, stop), name="loader", daemon=True
        )
        producer.start()
        try:
            while True:
                started = time.perf_counter()
                item = ahead.get()
                self.counters["wait_seconds"] += time.perf_counter() - started
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    self.next_epoch, self.next_step = epoch + 1, 0
                    return
                last = item.step + 1 == self.steps_per_epoch
                self.next_epoch, self.next_step = (epoch + 1, 0) if last else (epoch, item.step + 1)
                yield item
        finally:
            stop.set()
            while producer.is_alive():
                drain(ahead)
                producer.join(0.05)

    def _produce(self, epoch: int, start_step: int, ahead: queue.Queue[Any], stop: threading.Event) -> None:
        try:
            schedule = media_schedule(self.media_steps, self.config.seed, epoch)
            plans = {kind: line.plan(epoch) for kind, line in self.lines.items()}
            done = {kind: schedule[:start_step].count(kind) for kind in self.lines}
            for step in range(start_step, len(schedule)):
                kind = schedule[step]
                batch = self.make_batch(kind, plans[kind], epoch, step, done[kind])
                done[kind] += 1
                if not offer(ahead, batch, stop):
                    return
            offer(ahead, None, stop)
        except BaseException as error:  # handed to the consumer, which raises it
            offer(ahead, error, stop)

    def make_batch(self, kind: str, plan: EpochPlan, epoch: int, step: int, media_step: int) -> Batch:
        """This rank's part of a step's global batch, bad samples replaced by others of their lanes."""
        line = self.lines[kind]
        positions = rank_positions(media_step, self.batch_size[kind], self.rank, self.world_size)
        started = time.perf_counter()
        fetched = list(self.pool.map(lambda p: self._fetch(line, plan, epoch, int(p), 0), positions))
        read = time.perf_counter()
        tries = [tried for _, tried in fetched]
        samples = [item for item, _ in fetched]
        frames, bad = self.decoder.decode([item.clip for item in samples])
        while bad:
            for number, reason in bad.items():
                self._quarantine(samples[number].sample, reason)
                position = int(positions[number])
                samples[number], tries[number] = self._fetch(line, plan, epoch, position, tries[number] + 1)
            again = sorted(bad)
            mended, bad_again = self.decoder.decode([samples[number].clip for number in again])
            frames[again] = mended
            bad = {again[place]: reason for place, reason in bad_again.items()}
        self.counters["read_seconds"] += read - started
        self.counters["decode_seconds"] += time.perf_counter() - read
        self.counters["samples"] += len(samples)
        self._judge()
        self.counters["bytes_read"] += sum(len(data) for item in samples for data in item.clip.jpegs)
        return self._collate(kind, epoch, step, frames, samples)

    def _fetch(self, line: Line, plan: EpochPlan, epoch: int, position: int, tried: int) -> tuple[Fetched, int]:
        """A sample's bytes; where they are bad, those of the next good one in its lane, and how far that was."""
        while tried < MAX_REPLACEMENTS:
            sample = line.find(plan, np.array([replacement(position, tried, plan)]))[0]
            if sample.name not in self.quarantine:
                try:
                    return line.fetch(sample, epoch), tried
                except BadSampleError as error:
                    self._quarantine(sample, str(error))
            tried += 1
        raise ValueError(
            f"{MAX_REPLACEMENTS} samples in a row are unusable, the last {sample.name} "
            f"({self.quarantine.get(sample.name)}): check the corpus with `python -m sharding.verify`"
        )

    def _quarantine(self, sample: Sample, reason: str) -> None:
        self.quarantine[sample.name] = reason
        self.counters["quarantined"] = len(self.quarantine)
        log.warning("rank %d: %s is left out: %s", self.rank, sample.name, reason)

    def _judge(self) -> None:
        """Raise ValueError when more of the samples read are unusable than `max_bad_share`."""
        seen = self.counters["samples"]
        if seen >= ENOUGH_TO_JUDGE and len(self.quarantine) > self.config.max_bad_share * seen:
            name, reason = list(self.quarantine.items())[-1]
            raise ValueError(
                f"{len(self.quarantine)} of {seen:.0f} samples are unusable, more than max_bad_share="
                f"{self.config.max_bad_share}; the last is {name} ({reason}): "
                "check the corpus with `python -m sharding.verify`"
            )

    def _collate(self, kind: str, epoch: int, step: int, frames: torch.Tensor, samples: list[Fetched]) -> Batch:
        length = QUESTION_LENGTH if self.config.unit == "questions" else getattr(self.config.max_txt_l, kind)
        input_ids, attention_mask = self.tokenizer.encode([clean_text(item.text) for item in samples], length)
        return Batch(
            media_type=kind,
            epoch=epoch,
            step=step,
            frames=frames,
            input_ids=input_ids,
            attention_mask=attention_mask,
            idx=torch.tensor([item.sample.visual for item in samples]),
            keys=tuple(item.sample.name for item in samples),
            answers=self._answers(kind, samples) if self.config.unit == "questions" else None,
        )

    def _answers(self, kind: str, samples: list[Fetched]) -> Answers:
        texts = [f"{clean_text(answer)} [SEP]" for item in samples for answer, _ in item.answers]
        input_ids, attention_mask = self.tokenizer.encode(texts, ANSWER_LENGTH[kind])
        weights = torch.tensor([weight for item in samples for _, weight in item.answers])
        return Answers(input_ids, attention_mask, weights, torch.tensor([len(item.answers) for item in samples]))

    def close(self) -> None:
        """End the threads and close the files."""
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.decoder.close()
        for line in self.lines.values():
            line.close()


def replacement(position: int, tried: int, plan: EpochPlan) -> int:
    """The position itself, then the following ones of its lane, around its end."""
    lane = position % plan.lanes
    first, end = plan.lane_bounds(lane)
    if end - first <= tried:  # a lane too short to help: any other
        return (position + tried) % plan.units
    return lane + plan.lanes * ((position // plan.lanes + tried) % (end - first))


def offer(ahead: queue.Queue[Any], item: Any, stop: threading.Event) -> bool:
    """Put an item on the queue; False when the consumer has gone."""
    while not stop.is_set():
        try:
            ahead.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


def drain(ahead: queue.Queue[Any]) -> None:
    """Empty a queue."""
    while True:
        try:
            ahead.get_nowait()
        except queue.Empty:
            return
