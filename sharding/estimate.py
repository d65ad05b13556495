"""Estimates size and time of a build by packing a sample of its media: `sharding.build --dry-run`."""

from __future__ import annotations

import math
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.units import data_size, duration
from sharding.annotations.staging import Staged
from sharding.executors.build_shard import build_shard
from sharding.reasons import kind_of, summary
from sharding.shards.failures import TooManyFailures
from sharding.shards.plan import Task
from storage.parquet import read_table
from storage.urls import join_url

SAMPLE = {"image": 128, "video": 24}  # media
Z_95 = 1.96  # standard errors to either side: 95 % of the time


@dataclass(frozen=True)
class Estimate:
    """The estimated size and time of a build."""

    staged: Staged
    shards: int
    sampled: int
    failures: dict[str, int]  # kinds of failures in the sample
    bytes: float  # of all shards and indices
    margin: float  # bytes to either side
    frames: float
    seconds: float  # of work on one core
    workers: int
    free: int | None  # bytes on the output's disk

    def check(self, max_failures: float) -> None:
        """Raise TooManyFailures where a larger share of the sample failed than the build would allow."""
        failed = sum(self.failures.values())
        if failed > max_failures * self.sampled:
            raise TooManyFailures(
                f"{failed} of the {self.sampled} media tried failed ({failed / self.sampled:.1%}, at most "
                f"{max_failures:.1%} allowed): the build would fail, too: repair them, or raise --max-failures"
            )

    def lines(self) -> Iterator[str]:
        """The estimate as text."""
        filtered = self.staged.rows - self.staged.kept
        yield f"{self.staged.rows:,} rows = {self.staged.kept:,} to pack + {filtered:,} filtered"
        yield from (f"  {count:>6,} x filtered: {reason}" for reason, count in self.staged.filtered.items())
        yield f"{self.staged.items:,} media in {self.shards:,} shards; {self.sampled} of them tried"
        failed = sum(self.failures.values())
        if failed:
            yield f"{failed} of {self.sampled} failed:"
            yield from summary(Counter(self.failures))
        yield f"size: {data_size(self.bytes)} ± {data_size(self.margin)}; {self.frames:,.0f} frames"
        yield f"time: {duration(self.seconds / self.workers)} on {self.workers} cores, {duration(self.seconds)} on one"
        if self.free is not None and self.free < self.bytes + self.margin:
            yield f"the disk of the output has {data_size(self.free)} free: that may be too little"


def estimate_build(staged: Staged, tasks: list[Task], workers: int) -> Estimate:
    """Pack a sample of the media, spread evenly over all, into a folder that is deleted again.

    tasks: those of the whole build. Raises OSError when the media's store cannot be reached.
    """
    settings = tasks[0].settings
    count = min(staged.items, SAMPLE[settings.media_type])
    items = [staged.between(at, at + 1)[0] for at in (number * staged.items // count for number in range(count))]
    with tempfile.TemporaryDirectory(prefix="singularity-estimate-") as folder:
        task = replace(tasks[0], items=items, output=folder, scratch=folder)
        start = time.perf_counter()
        shard = build_shard(task, lambda *_: None)
        seconds = time.perf_counter() - start
        sizes = read_table(join_url(folder, shard.info.index_name), ["sizes"]).column("sizes").to_pylist()
    share = staged.items / count
    each = [sum(size) for size in sizes] + [0] * len(shard.failures)
    spread = statistics.stdev(each) if count > 1 else 0.0
    return Estimate(
        staged=staged,
        shards=len(tasks),
        sampled=count,
        failures=dict(Counter(kind_of(failure["reason"]) for failure in shard.failures)),
        bytes=(shard.info.bytes + shard.info.index_bytes) * share,
        margin=0.0 if count == staged.items else Z_95 * spread / math.sqrt(count) * staged.items,
        frames=shard.info.frames * share,
        seconds=seconds * share,
        workers=min(workers, len(tasks)),
        free=free_bytes(tasks[0].output),
    )


def free_bytes(output: str) -> int | None:
    """Bytes free on the output's disk; None for a remote one."""
    if "://" in output:
        return None
    folder = Path(output).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
