"""The training loader: an epoch's batches in order, made ahead of the step by threads."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch

from loaders.batch import Answers, Batch
from loaders.config import LoaderConfig
from loaders.decode.decoder import BATCHES_AT_ONCE, make_decoder, usable_threads
from loaders.order.choices import BadSampleError
from loaders.order.epoch import EpochPlan, check_world_size, media_schedule, rank_positions
from loaders.order.mixture import Mixture, SampleSpec
from loaders.prefetch import Prefetcher, StalledError, overlapped
from loaders.quarantine import Quarantine
from loaders.shards import check_cache, open_corpus
from loaders.text import Tokenizer, clean_text
from runtime.errors import UserError
from runtime.ranks import ranks_of

log = logging.getLogger("loaders")

READ_THREADS = 8
MAX_REPLACEMENTS = 64  # tries for one sample before the loader gives up


@dataclass
class Step:
    """A step's part of one rank on its way: B positions of the epoch, and what was found there."""

    kind: str
    number: int  # in the epoch
    plan: EpochPlan
    positions: np.ndarray
    draws: list[SampleSpec] = field(default_factory=list)
    jpegs: list[list[bytes]] = field(default_factory=list)
    tries: list[int] = field(default_factory=list)  # unusable samples passed over for each position


class TrainLoader:
    """Batches of images and videos, exactly once an epoch over all ranks, the same for any number of ranks.

    Iterating gives the rest of the current epoch; `state_dict` is (epoch, step) and resuming costs nothing.
    `figures()` are all counters; `counters` those of the loader itself: seconds that the stages worked (read_, decode_)
    and that they waited for the one before (decode_wait_, and wait_ for the training step); samples,
    bytes_read, quarantined.

    device: where batches are used: a GPU decodes there (`decode`), or gets them from pinned memory.

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
        device: torch.device | str = "cpu",
    ) -> None:
        if not corpora:
            raise UserError("train_corpus is empty: name at least one packed corpus")
        check_positive(config)
        self.config, self.tokenizer, self.rank, self.world_size = config, tokenizer, rank, world_size
        stripes = config.stripes // math.gcd(config.stripes, world_size)  # that this rank reads
        ranks = ranks_of(rank, world_size, ranks_here)
        readers = [open_corpus(url, config, stripes * (config.window_shards + 2), ranks) for url in corpora]
        check_cache(readers, config, min(config.stripes, stripes * (ranks_here or world_size)))
        check_weights(config, [reader.corpus.name for reader in readers])
        kinds = sorted({reader.corpus.media_type for reader in readers})
        self.pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read")
        self.batch_pool = ThreadPoolExecutor(BATCHES_AT_ONCE, thread_name_prefix="batch")
        self._remote = any(not reader.local for reader in readers)
        self._counting = threading.Lock()
        self.lines = {
            kind: Mixture(
                kind,
                [reader for reader in readers if reader.corpus.media_type == kind],
                config,
                self.pool,
                ranks.offset,
            )
            for kind in kinds
        }
        self.batch_size = {kind: getattr(config.batch_size, kind) for kind in kinds}
        self.media_steps = {kind: self._count_steps(kind) for kind in kinds}
        self.step_pool = ThreadPoolExecutor(self._steps_at_once(), thread_name_prefix="step")
        threads = usable_threads(config.threads, ranks_here or world_size)
        self.decoder = make_decoder(
            config.decode, config.image_res, threads, config.antialias, torch.device(device), config.deterministic
        )
        self.counters: dict[str, float] = defaultdict(float)
        self.quarantine = Quarantine(rank, config.max_bad_share, config.quarantine_file.replace("{rank}", str(rank)))
        self._running: list[Prefetcher[Step] | Prefetcher[Batch]] = []
        self._stalled = False
        self._readiness: dict[str, float] = {}
        self.next_epoch, self.next_step = 0, 0

    def _count_steps(self, kind: str) -> int:
        """Batches of a medium in an epoch; what does not fill one is left out, other samples each epoch."""
        size, units = self.batch_size[kind], self.lines[kind].units
        check_world_size(size, self.world_size, kind)
        if size > units:
            most = units // self.world_size * self.world_size
            names = ", ".join(reader.corpus.name for reader in self.lines[kind].readers)
            raise UserError(
                f"batch_size.{kind}={size} is more than the {units} {self.config.epoch_unit} of {names}: "
                + (f"set batch_size.{kind}={most} or less" if most else f"use at most {units} processes, or more data")
            )
        return units // size

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
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
        """Batches start_step, start_step + 1 ... of an epoch; reading and decoding are at most `prefetch` ahead."""
        if self.rank == 0:
            for kind, line in self.lines.items():
                steps, size, units = self.media_steps[kind], self.batch_size[kind], line.units
                log.debug(
                    "epoch %d: %d %s batches of %d, %d of %d left out", epoch, steps, kind, size, units % size, units
                )
        fetched = Prefetcher(self.fetch_steps(epoch, start_step), self._steps_kept(), "loader-read")
        batches = Prefetcher(
            self._make_batches(fetched), self.config.prefetch, "loader-decode", self.config.stall_timeout, self.pending
        )
        self._running += [fetched, batches]
        before = self.counters["wait_seconds"]
        try:
            for batch in batches:
                self.counters["wait_seconds"] = before + batches.waited
                last = batch.step + 1 == self.steps_per_epoch
                self.next_epoch, self.next_step = (epoch + 1, 0) if last else (epoch, batch.step + 1)
                yield batch
        except StalledError:
            self._stalled = True  # its threads cannot be waited for
            raise
        finally:
            if not self._stalled:
                self._end([fetched, batches])

    def _end(self, stages: list[Prefetcher[Step] | Prefetcher[Batch]]) -> None:
        """Stop stages and wait for their threads; what they read from stores is broken off."""
        self._note_readiness()
        for stage in stages:
            stage.stop()
        for stage in stages:
            while not stage.ended(0.05):
                for line in self.lines.values():
                    line.cancel()
            if stage in self._running:
                self._running.remove(stage)

    def pending(self) -> list[str]:
        """What of the stores is being waited for: URL, bytes, seconds, tries."""
        return [what for line in self.lines.values() for reader in line.readers for what in reader.pending()]

    def figures(self) -> dict[str, float]:
        """All counters so far: the loader's, the stores' and the cache's, and how ready the stages' queues were."""
        total = dict(self.counters)
        for line in self.lines.values():
            for reader in line.readers:
                for name, value in reader.counters().items():
                    total[name] = total.get(name, 0) + value
        self._note_readiness()
        return total | self._readiness

    def _note_readiness(self) -> None:
        for stage, name in zip(self._running, ("read_ready", "decode_ready"), strict=False):
            self._readiness[name] = round(stage.readiness(), 4)

    def fetch_steps(self, epoch: int, start_step: int) -> Generator[Step, None, None]:
        """The reading stage: this rank's part of every step, as bytes; of stores several steps at the same time."""
        return overlapped(self._fetch_step, self._steps(epoch, start_step), self.step_pool, self._steps_at_once())

    def _steps(self, epoch: int, start_step: int) -> Iterator[Step]:
        """The steps of an epoch, nothing read yet."""
        schedule = media_schedule(self.media_steps, self.config.seed, epoch)
        plans = {kind: line.plan(epoch) for kind, line in self.lines.items()}
        done = {kind: schedule[:start_step].count(kind) for kind in self.lines}
        for number in range(start_step, len(schedule)):
            kind = schedule[number]
            positions = rank_positions(done[kind], self.batch_size[kind], self.rank, self.world_size)
            done[kind] += 1
            yield Step(kind, number, plans[kind], positions)

    def _fetch_step(self, step: Step) -> Step:
        started, rows = time.perf_counter(), len(step.positions)
        step.draws, step.jpegs, step.tries = [None] * rows, [[]] * rows, [0] * rows  # type: ignore[list-item]
        self._fetch(step, list(range(rows)))
        with self._counting:
            self.counters["read_seconds"] += time.perf_counter() - started
            self.counters["steps_read"] += 1
            self.counters["bytes_read"] += sum(len(data) for jpegs in step.jpegs for data in jpegs)
        return step

    def _steps_at_once(self) -> int:
        """How many steps are read at the same time: of stores as many as `remote.ahead_mb` has room for."""
        if not self._remote:
            return 1
        return min(self.config.remote.ahead_steps, max(1, self._steps_ahead() - self._steps_kept()))

    def _steps_kept(self) -> int:
        """How many steps that have been read wait for decoding at most."""
        return min(self.config.prefetch, max(1, self._steps_ahead() // 2)) if self._remote else self.config.prefetch

    def _steps_ahead(self) -> int:
        """How many steps' bytes `remote.ahead_mb` holds, of the medium whose steps are larger."""
        largest = 1.0
        for kind, line in self.lines.items():
            shards = [shard for reader in line.readers for shard in reader.corpus.shards]
            frame = sum(shard.bytes for shard in shards) / max(1, sum(shard.frames for shard in shards))
            frames = self.config.video_input.num_frames if kind == "video" else 1
            largest = max(largest, frame * frames * self.batch_size[kind] / self.world_size)
        return int(self.config.remote.ahead_mb * 2**20 // largest)

    def _make_batches(self, fetched: Prefetcher[Step]) -> Generator[Batch, None, None]:
        """The decoding stage: steps to batches, their texts to tokens."""
        waited, making = self.counters["decode_wait_seconds"], deque[Future[Batch]]()
        started, waited_before = time.perf_counter(), 0.0
        for step in chain(fetched, [None] * (BATCHES_AT_ONCE - 1)):
            if step is not None:
                making.append(self.batch_pool.submit(self._make_batch, step))
            if (step is not None and len(making) < BATCHES_AT_ONCE) or not making:
                continue
            batch = making.popleft().result()
            self.counters["decode_wait_seconds"] = waited + fetched.waited
            self.counters["decode_seconds"] += time.perf_counter() - started - (fetched.waited - waited_before)
            self.quarantine.judge(self.counters["samples"])
            yield batch
            started, waited_before = time.perf_counter(), fetched.waited

    def _make_batch(self, step: Step) -> Batch:
        """One step's batch; a thread of `batch_pool` is at the next one meanwhile, so that no decoder idles."""
        frames = self._decode(step)
        batch = self._collate(step, frames)
        with self._counting:
            self.counters["samples"] += len(step.draws)
        return batch

    def _fetch(self, step: Step, rows: list[int]) -> None:
        """Find and read the samples of some of a step's rows; unusable ones give way to the next of their stripes."""
        line = self.lines[step.kind]
        while rows:
            places = [replacement(int(step.positions[row]), step.tries[row], step.plan) for row in rows]
            draws = line.draw(step.plan, np.array(places))
            again = []
            for row, draw, jpegs in zip(rows, draws, line.read(draws), strict=True):
                reason = str(jpegs) if isinstance(jpegs, BadSampleError) else self.quarantine.known(draw)
                if reason is not None:
                    self._pass_over(step, row, draw, reason)
                    again.append(row)
                elif not isinstance(jpegs, BadSampleError):
                    step.draws[row], step.jpegs[row] = draw, jpegs
            rows = again

    def _decode(self, step: Step) -> torch.Tensor:
        """Frames (B, T, S, S, 3) of a step; samples that do not decode are replaced."""
        frames, bad = self.decoder.decode([draw.clip(jpegs) for draw, jpegs in zip(step.draws, step.jpegs)])
        while bad:
            rows = sorted(bad)
            for row in rows:
                self._pass_over(step, row, step.draws[row], bad[row])
            self._fetch(step, rows)
            mended, bad_again = self.decoder.decode([step.draws[row].clip(step.jpegs[row]) for row in rows])
            frames[torch.tensor(rows)] = mended.to(frames.device)  # decode=auto: of another decoder perhaps
            bad = {rows[place]: reason for place, reason in bad_again.items()}
        return frames

    def _pass_over(self, step: Step, row: int, draw: SampleSpec, reason: str) -> None:
        """Note an unusable sample, and that its row wants another one."""
        tar = self.lines[step.kind].readers[draw.corpus].corpus.tar_url(draw.shard)
        self.quarantine.add(draw, tar, reason, step.plan.epoch, step.number)
        self.counters["quarantined"] = len(self.quarantine)
        step.tries[row] += 1
        if step.tries[row] >= MAX_REPLACEMENTS:
            raise UserError(
                f"{MAX_REPLACEMENTS} samples in a row are unusable, the last {draw.name} ({reason}): "
                "check the corpus with `python -m sharding.verify`"
            )

    def _collate(self, step: Step, frames: torch.Tensor) -> Batch:
        length = (
            self.config.max_q_len
            if self.config.epoch_unit == "questions"
            else getattr(self.config.max_txt_l, step.kind)
        )
        input_ids, attention_mask = self.tokenizer.encode([clean_text(draw.text) for draw in step.draws], length)
        return Batch(
            media_type=step.kind,
            epoch=step.plan.epoch,
            step=step.number,
            frames=frames,
            input_ids=input_ids,
            attention_mask=attention_mask,
            idx=torch.tensor([draw.visual for draw in step.draws]),
            keys=tuple(draw.name for draw in step.draws),
            answers=self._answers(step) if self.config.epoch_unit == "questions" else None,
        )

    def _answers(self, step: Step) -> Answers:
        texts = [f"{answer} [SEP]" for draw in step.draws for answer, _ in draw.answers]
        input_ids, attention_mask = self.tokenizer.encode(texts, getattr(self.config.max_a_len, step.kind))
        weights = torch.tensor([weight for draw in step.draws for _, weight in draw.answers])
        return Answers(input_ids, attention_mask, weights, torch.tensor([len(draw.answers) for draw in step.draws]))

    def close(self) -> None:
        """End the threads, also those of an iteration that is not over, and close the files."""
        if not self._stalled:
            self._end(list(self._running))
        for line in self.lines.values():
            line.cancel()
        for pool in (self.step_pool, self.batch_pool, self.pool):
            pool.shutdown(wait=not self._stalled, cancel_futures=True)
        self.decoder.close()
        for line in self.lines.values():
            line.close()


def check_positive(config: LoaderConfig) -> None:
    """Raise ValueError for settings that must be at least 1, and a seed below 0."""
    if config.seed < 0:
        raise UserError(f"seed is {config.seed}, must be 0 or more")
    values = {name: getattr(config, name) for name in ("image_res", "stripes", "window_shards", "prefetch")}
    for name, value in {**values, "video_input.num_frames": config.video_input.num_frames}.items():
        if value < 1:
            raise UserError(f"{name} is {value}, must be at least 1")


def check_weights(config: LoaderConfig, names: Sequence[str]) -> None:
    """Raise ValueError for weights of corpora that are not there, and of no use."""
    for name, weight in config.corpus_weights.items():
        if name not in names:
            raise UserError(f"corpus_weights names {name!r}, the corpora are {', '.join(sorted(set(names)))}")
        if not 0 < weight < math.inf:
            raise UserError(f"corpus_weights.{name} is {weight}, must be above 0: passes over the corpus an epoch")


def replacement(position: int, tried: int, plan: EpochPlan) -> int:
    """The position itself, then the following ones of its stripe, around its end."""
    if not tried:
        return position
    stripe = position % plan.stripes
    first, end = plan.stripe_bounds(stripe)
    if end - first <= tried:  # a stripe too short to help: any other
        return (position + tried) % plan.units
    return stripe + plan.stripes * ((position // plan.stripes + tried) % (end - first))
