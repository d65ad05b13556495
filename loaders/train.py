"""The training loader: an epoch's batches in order, made ahead of the step by threads.

The chain of stages is drawn in loaders/samples.py. Specs and bytes are made in the reading stage, pixels and batches in
the decoding stage; each runs ahead of the next one in threads.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from loaders.augment import augmented, check_augmentations
from loaders.batch import Batch, collate
from loaders.columns import ExtraColumns
from loaders.config import LoaderConfig, check_weights
from loaders.decode.choice import make_decoder
from loaders.decode.decoder import BATCHES_AT_ONCE, Decoder, decode_samples
from loaders.order.epoch import EpochPlan, check_world_size, media_schedule, rank_positions
from loaders.order.mixture import Mixture
from loaders.prefetch import Prefetcher, StalledError, overlapped
from loaders.quarantine import Quarantine
from loaders.samples import DecodedSamples, RawSample
from loaders.shards import check_cache, open_corpus
from preprocessing.text import Tokenizer
from runtime.errors import UserError
from runtime.ranks import cores_per_process, ranks_of
from runtime.settings import check_declared

log = logging.getLogger("loaders")

READ_THREADS = 8
MAX_REPLACEMENTS = 64  # tries for one sample before the loader gives up


@dataclass(frozen=True)
class Step:
    """This rank's part of one step: B positions of the epoch, of one medium."""

    media_type: str
    number: int  # in the epoch
    plan: EpochPlan
    positions: np.ndarray  # (B,) int64


class TrainLoader:
    """Batches of images and videos, exactly once an epoch over all ranks, the same for any number of ranks.

    Iterating gives the rest of the current epoch; `state_dict` is (epoch, step), and resuming costs nothing.
    tokenizer: None makes batches without tokens, also of corpora without texts: for measuring input and output.
    device: where batches are used: a GPU decodes there (`decode`), or gets them from pinned memory.
    Raises FileNotFoundError, ValueError: a corpus is missing, of another version or without the needed texts; a batch
    size does not fit the world size; a setting is unknown.
    """

    def __init__(
        self,
        corpora: Sequence[str],
        tokenizer: Tokenizer | None,
        config: LoaderConfig,
        rank: int = 0,
        world_size: int = 1,
        local_world_size: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not corpora:
            raise UserError("train_corpus is empty: name at least one packed corpus")
        check_declared(config)
        check_augmentations(config.augmentations)
        self.config, self.tokenizer, self.rank, self.world_size = config, tokenizer, rank, world_size
        stripes = config.stripes // math.gcd(config.stripes, world_size)  # that this rank reads
        ranks = ranks_of(rank, world_size, local_world_size)
        extra, shards_open = ExtraColumns(config.extra_columns), stripes * (config.window_shards + 2)
        self.readers = [open_corpus(url, config, shards_open, ranks, extra) for url in corpora]
        check_cache(self.readers, config, min(config.stripes, stripes * (local_world_size or world_size)))
        check_weights(config, [reader.corpus.name for reader in self.readers])
        if extra.names:
            for reader in self.readers:
                reader.index(0)  # raises where a column is missing
        self._read_pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read")
        self._batch_pool = ThreadPoolExecutor(BATCHES_AT_ONCE, thread_name_prefix="batch")
        self.mixtures: dict[str, Mixture] = {}
        for media_type in sorted({reader.corpus.media_type for reader in self.readers}):
            readers = [reader for reader in self.readers if reader.corpus.media_type == media_type]
            texts = tokenizer is not None
            self.mixtures[media_type] = Mixture(media_type, readers, config, self._read_pool, texts, ranks.offset)
        self.batch_size = {media_type: getattr(config.batch_size, media_type) for media_type in self.mixtures}
        self.media_steps = {media_type: self._count_steps(media_type) for media_type in self.mixtures}
        self._steps_at_once, self._steps_kept = self._read_depth()
        self._step_pool = ThreadPoolExecutor(self._steps_at_once, thread_name_prefix="step")
        self._threads = config.threads or cores_per_process(local_world_size or world_size)
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:  # the threads' own device is the first one
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.decoder = self._make_decoder()
        self.quarantine = Quarantine(rank, config.max_bad_share, config.quarantine_file.replace("{rank}", str(rank)))
        self._counters: dict[str, float] = defaultdict(float)
        self._counting = threading.Lock()
        self._running: list[Prefetcher[Any]] = []
        self._stalled = False
        self._readiness: dict[str, float] = {}
        self.next_epoch, self.next_step = 0, 0

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _make_decoder(self) -> Decoder:
        config = self.config
        return make_decoder(
            config.decode, config.image_res, self._threads, config.antialias, self.device, config.deterministic
        )

    def set_image_res(self, size: int) -> None:
        """Show frames of `size` x `size` pixels from now on; between two epochs. Nothing else of a batch changes."""
        self.decoder.close()
        self.config = replace(self.config, image_res=size)
        self.decoder = self._make_decoder()

    def _count_steps(self, media_type: str) -> int:
        """Batches of a medium in an epoch; the samples that do not fill one are left out, others in each epoch."""
        size, units = self.batch_size[media_type], self.mixtures[media_type].units
        check_world_size(size, self.world_size, media_type)
        if size > units:
            most = units // self.world_size * self.world_size
            names = ", ".join(reader.corpus.name for reader in self.mixtures[media_type].readers)
            remedy = f"set batch_size.{media_type}={most} or less" if most else f"use at most {units} processes"
            raise UserError(
                f"batch_size.{media_type}={size} is more than the {units} {self.config.epoch_unit} of {names}: {remedy}"
                + ("" if most else ", or more data")
            )
        return units // size

    def _read_depth(self) -> tuple[int, int]:
        """(steps read at the same time, steps read and not yet decoded): of stores what `remote.ahead_mb` holds."""
        remote, prefetch = self.config.remote, self.config.prefetch
        if all(reader.local for reader in self.readers):
            return 1, prefetch
        largest = 1.0  # bytes of a step, of the medium whose steps are larger
        for media_type, mixture in self.mixtures.items():
            shards = [shard for reader in mixture.readers for shard in reader.corpus.shards]
            frame = sum(shard.bytes for shard in shards) / max(1, sum(shard.frames for shard in shards))
            frames = self.config.video_input.num_frames if media_type == "video" else 1
            largest = max(largest, frame * frames * self.batch_size[media_type] / self.world_size)
        fitting = int(remote.ahead_mb * 2**20 // largest)
        kept = min(prefetch, max(1, fitting // 2))
        return min(remote.ahead_steps, max(1, fitting - kept)), kept

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return sum(self.media_steps.values())

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch; the next iteration is the next epoch."""
        yield from self.epoch(self.next_epoch, self.next_step)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; one that has begun goes on. Iterating does this by itself, epoch after epoch."""
        if epoch != self.next_epoch:
            self.next_epoch, self.next_step = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """The position of the next batch; O(1), valid on any world size that divides the batch sizes."""
        return {"epoch": self.next_epoch, "step": self.next_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state_dict()`."""
        self.next_epoch, self.next_step = int(state["epoch"]), int(state["step"])

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches start_step, start_step + 1 ... of an epoch; at most `prefetch` are ready ahead of the step."""
        if self.rank == 0:
            for media_type, mixture in self.mixtures.items():
                steps, size, units = self.media_steps[media_type], self.batch_size[media_type], mixture.units
                left_out = f"{units % size} of {units}"
                log.debug("epoch %d: %d %s batches of %d, %s dropped", epoch, steps, media_type, size, left_out)
        read = Prefetcher(self.read_steps(epoch, start_step), self._steps_kept, "loader-read")
        batches = Prefetcher(
            self._make_batches(read), self.config.prefetch, "loader-decode", self.config.stall_timeout, self.pending
        )
        self._running += [read, batches]
        before = self._counters["wait_seconds"]
        try:
            for batch in batches:
                self._counters["wait_seconds"] = before + batches.waited
                last = batch.step + 1 == self.steps_per_epoch
                self.next_epoch, self.next_step = (epoch + 1, 0) if last else (epoch, batch.step + 1)
                yield batch
        except StalledError:
            self._stalled = True  # its threads cannot be waited for
            raise
        finally:
            if not self._stalled:
                self._end([read, batches])

    def steps(self, epoch: int, start_step: int) -> Iterator[Step]:
        """The steps of an epoch: pure arithmetic."""
        schedule = media_schedule(self.media_steps, self.config.seed, epoch)
        plans = {media_type: mixture.plan(epoch) for media_type, mixture in self.mixtures.items()}
        done = {media_type: schedule[:start_step].count(media_type) for media_type in self.mixtures}
        for number in range(start_step, len(schedule)):
            medium = schedule[number]
            positions = rank_positions(done[medium], self.batch_size[medium], self.rank, self.world_size)
            done[medium] += 1
            yield Step(medium, number, plans[medium], positions)

    def read_steps(self, epoch: int, start_step: int) -> Generator[tuple[Step, list[RawSample]], None, None]:
        """The reading stage: the bytes of every step; of stores, those of several steps at the same time."""
        return overlapped(self._read_step, self.steps(epoch, start_step), self._step_pool, self._steps_at_once)

    def _read_step(self, step: Step) -> tuple[Step, list[RawSample]]:
        started = time.perf_counter()
        raw = self._read(step)
        with self._counting:
            self._counters["read_seconds"] += time.perf_counter() - started
            self._counters["steps_read"] += 1
        return step, raw

    def _read(self, step: Step) -> list[RawSample]:
        """The bytes at a step's positions; a sample that is known to be bad is not read again."""
        mixture = self.mixtures[step.media_type]
        raw = mixture.read([self.quarantine.marked(spec) for spec in mixture.specs(step.plan, step.positions)])
        with self._counting:
            self._counters["bytes_read"] += sum(len(data) for sample in raw for data in sample.jpegs)
        return raw

    def _make_batches(self, read: Prefetcher[tuple[Step, list[RawSample]]]) -> Generator[Batch, None, None]:
        """The decoding stage; BATCHES_AT_ONCE are made at the same time, so that no decoder idles between two."""
        waited_before = self._counters["decode_wait_seconds"]
        started, waited = time.perf_counter(), 0.0
        for batch in overlapped(self._make_batch, read, self._batch_pool, BATCHES_AT_ONCE):
            self._counters["decode_wait_seconds"] = waited_before + read.waited
            self._counters["decode_seconds"] += time.perf_counter() - started - (read.waited - waited)
            self.quarantine.check_share(self._counters["samples"])
            yield batch
            started, waited = time.perf_counter(), read.waited

    def _make_batch(self, read: tuple[Step, list[RawSample]]) -> Batch:
        """The batch of one step, decoded from the bytes of its samples."""
        step, raw = read
        samples = self._replace_bad(step, decode_samples(self.decoder, raw))
        samples = augmented(samples, self.config.augmentations, self.device)
        batch = collate(samples, self.tokenizer, self.config, step.media_type, step.plan.epoch, step.number)
        with self._counting:
            self._counters["samples"] += len(raw)
        return batch

    def _replace_bad(self, step: Step, samples: DecodedSamples) -> DecodedSamples:
        """The only place where samples are replaced: bad ones, whatever the reason, by the next of their stripes.

        A bad sample goes to the quarantine. So the same samples are replaced by the same ones on any number of ranks.
        """
        for tried in range(1, MAX_REPLACEMENTS + 1):
            if not samples.reasons:
                return samples
            rows = sorted(samples.reasons)
            for row in rows:
                spec = samples.specs[row]
                tar = self.mixtures[step.media_type].readers[spec.corpus].corpus.tar_url(spec.record.shard)
                self.quarantine.add(spec, tar, samples.reasons[row], step.plan.epoch, step.number)
            positions = np.array([step.plan.replacement(int(step.positions[row]), tried) for row in rows])
            others = decode_samples(self.decoder, self._read(replace(step, positions=positions)))
            samples = samples.with_rows(rows, others)
        name, reason = list(self.quarantine.reasons.items())[-1]
        raise UserError(
            f"{MAX_REPLACEMENTS} samples in a row are unusable, the last {name} ({reason}): "
            "check the corpus with `python -m sharding.verify`"
        )

    def counters(self) -> dict[str, float]:
        """The counters of the loader since its start.

        Of the loader: seconds that the stages worked (read_, decode_) and waited for the one before (decode_wait_, and
        wait_ for the training step), steps_read, samples, bytes_read, quarantined, and the share of the time in which a
        stage had something ready (read_ready, decode_ready). Of stores and cache: see `CorpusReader.counters`.
        """
        total = dict(self._counters) | {"quarantined": len(self.quarantine)}
        for reader in self.readers:
            for name, value in reader.counters().items():
                total[name] = total.get(name, 0) + value
        self._note_readiness()
        return total | self._readiness

    def _note_readiness(self) -> None:
        for stage, name in zip(self._running, ("read_ready", "decode_ready"), strict=False):
            self._readiness[name] = round(stage.readiness(), 4)

    def pending(self) -> list[str]:
        """Description of the pending reads of all stores: URL, bytes, seconds, tries."""
        return [what for reader in self.readers for what in reader.pending()]

    def _end(self, stages: Sequence[Prefetcher[Any]]) -> None:
        """Stop stages and wait for their threads; pending reads from stores are cancelled."""
        self._note_readiness()
        for stage in stages:
            stage.stop()
        for stage in stages:
            while not stage.ended(0.05):
                self._cancel()
            if stage in self._running:
                self._running.remove(stage)

    def _cancel(self) -> None:
        for reader in self.readers:
            reader.cancel()

    def close(self) -> None:
        """End the threads, also those of an iteration that is not over, and close the files."""
        if not self._stalled:
            self._end(list(self._running))
        self._cancel()
        for pool in (self._step_pool, self._batch_pool, self._read_pool):
            pool.shutdown(wait=not self._stalled, cancel_futures=True)
        self.decoder.close()
        for reader in self.readers:
            reader.close()
