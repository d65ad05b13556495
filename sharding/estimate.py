"""Estimates size and time of a build by packing a sample of its media: `sharding.build --dry-run`."""

from __future__ import annotations

import math
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
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


def estimate_build(staged: Staged, tasks: list[Task], workers: int, max_failures: float) -> Iterator[str]:
    """Lines about a build's size and time: a sample of its media, spread evenly, is packed into a temporary folder.

    tasks: those of the whole build.

    Raises OSError: the media's store cannot be reached. TooManyFailures: after the last line, where a larger share of
    the sample failed than the build would allow.
    """
    count = min(staged.items, SAMPLE[tasks[0].settings.media_type])
    items = [staged.between(at, at + 1)[0] for at in (number * staged.items // count for number in range(count))]
    with tempfile.TemporaryDirectory(prefix="singularity-estimate-") as folder:
        start = time.perf_counter()
        shard = build_shard(replace(tasks[0], items=items, output=folder, scratch=folder))
        seconds = (time.perf_counter() - start) * staged.items / count
        sizes = read_table(join_url(folder, shard.info.index_name), ["sizes"]).column("sizes").to_pylist()
    failed = len(shard.failures)
    yield f"{staged.rows:,} rows = {staged.kept:,} to pack + {staged.rows - staged.kept:,} filtered"
    yield from (f"  {rows:>6,} x filtered: {reason}" for reason, rows in staged.filtered.items())
    yield f"{staged.items:,} media in {len(tasks):,} shards; {count} of them tried"
    if failed:
        yield f"{failed} of {count} failed:"
        yield from summary(Counter(kind_of(failure["reason"]) for failure in shard.failures))
    size = (shard.info.bytes + shard.info.index_bytes) * staged.items / count
    each = [sum(size) for size in sizes] + [0] * failed
    spread = statistics.stdev(each) if 1 < count < staged.items else 0.0
    margin = Z_95 * spread / math.sqrt(count) * staged.items
    frames = shard.info.frames * staged.items / count
    yield f"size: {data_size(size)} ± {data_size(margin)}; {frames:,.0f} frames"
    cores = min(workers, len(tasks))
    yield f"time: {duration(seconds / cores)} on {cores} cores, {duration(seconds)} on one"
    free = free_bytes(tasks[0].output)
    if free is not None and free < size + margin:
        yield f"the disk of the output has {data_size(free)} free: that may be too little"
    if failed > max_failures * count:
        raise TooManyFailures(
            f"{failed} of the {count} media tried failed ({failed / count:.1%}, at most {max_failures:.1%} allowed): "
            "the build would fail, too: repair them, or raise --max-failures"
        )


def free_bytes(output: str) -> int | None:
    """Bytes free on the output's disk; None for a remote one."""
    if "://" in output:
        return None
    folder = Path(output).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
