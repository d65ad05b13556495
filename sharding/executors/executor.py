"""Executors that build shards: processes of this machine or a Ray cluster; all shards or one job part."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from runtime.errors import UserError
from runtime.flags import flag
from runtime.process_pool import Advance, run_tasks
from runtime.progress import Progress
from sharding.executors.build_shard import build_shard
from sharding.executors.ray_cluster import run_on_ray
from sharding.shards.failures import FailureLog
from sharding.shards.output import remove
from sharding.shards.plan import Task
from sharding.shards.schema import ShardInfo
from sharding.shards.writing import FinishedShard, finished_shard
from storage.urls import join_url

LOOKUPS = 16  # shards looked up at once in a store
PART = re.compile(r"(\d+)/(\d+)")
Run = Callable[[list[Task], int, Advance], Iterator[tuple[Task, FinishedShard]]]  # tasks, workers, progress

log = logging.getLogger("sharding")


def run_in_processes(tasks: list[Task], workers: int, advance: Advance) -> Iterator[tuple[Task, FinishedShard]]:
    """(task, shard) of each task as it is finished, in processes of this machine."""
    return run_tasks(build_shard, tasks, min(workers, len(tasks)), advance)


EXECUTORS: dict[str, Run] = {"processes": run_in_processes, "ray": run_on_ray}


@dataclass(frozen=True)
class Executor:
    """Settings of the executor; they do not change the shards' bytes."""

    workers: int | None = flag(None, "worker processes (default: one per core)", type=int)
    engine: str = flag(
        "processes", "ray: tasks on a running Ray cluster (default: %(default)s)", choices=tuple(EXECUTORS)
    )
    part: str = flag("", "build the I-th of N shares of the shards, as one of N jobs", metavar="I/N")
    finish: bool = flag(False, "only write corpus.json, after all parts are complete")

    def check(self) -> None:
        """Raise ValueError, with the remedy, for settings that cannot work."""
        if self.engine not in EXECUTORS:
            raise UserError(f"--engine is {self.engine!r}, must be one of {', '.join(EXECUTORS)}")
        if self.part and not ((match := PART.fullmatch(self.part)) and 1 <= int(match[1]) <= int(match[2])):
            raise UserError(f"--part is {self.part!r}, must be I/N with I from 1 to N, such as 2/8")
        if self.part and self.finish:
            raise UserError("--part builds and --finish does not: give one of them")

    @property
    def processes(self) -> int:
        """Number of concurrent processes."""
        return self.workers or os.cpu_count() or 1

    def of_this_job(self, tasks: list[Task]) -> list[Task]:
        """The tasks of this job part."""
        if self.finish:
            return []
        number, jobs = map(int, self.part.split("/")) if self.part else (1, 1)
        return [task for task in tasks if task.number % jobs == number - 1]

    def run(self, tasks: list[Task], advance: Advance) -> Iterator[tuple[Task, FinishedShard]]:
        """(task, shard) of each task as it is finished."""
        return EXECUTORS[self.engine](tasks, self.processes, advance) if tasks else iter(())


def build_shards(
    tasks: list[Task], executor: Executor, retry_failed: bool, failures: FailureLog, progress: Progress
) -> tuple[list[ShardInfo], int]:
    """The complete shards, in order, and the annotation rows in them; those already complete are not built again.

    They are all of them, unless this is one job of several and others are not done.

    Raises ValueError: `executor.finish`, and shards are missing.
    """
    shards: dict[int, ShardInfo] = {}
    rows = 0

    def keep(number: int, shard: FinishedShard) -> None:
        nonlocal rows
        shards[number] = shard.info
        rows += shard.rows
        failures.add(number, shard.failures)

    for task, done in finished(tasks):
        if not (retry_failed and done.failures):
            keep(task.number, done)
            progress.skip(done.info.samples, len(done.failures), done.info.bytes)
    pending = executor.of_this_job([task for task in tasks if task.number not in shards])
    if pending:
        unpublish(pending)
    for task, shard in executor.run(pending, progress.advance):
        keep(task.number, shard)
    for task, done in finished([task for task in tasks if task.number not in shards]):  # by other jobs, meanwhile
        keep(task.number, done)
    missing = [task.name for task in tasks if task.number not in shards]
    if missing and executor.finish:
        raise UserError(
            f"{len(missing)} of {len(tasks)} shards are not complete in {tasks[0].output} ({', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}): run the parts that build them again, then --finish"
        )
    if missing:
        log.info("part %s is complete; other parts build %d of %d shards", executor.part, len(missing), len(tasks))
    return [shards[number] for number in sorted(shards)], rows


def finished(tasks: list[Task]) -> Iterator[tuple[Task, FinishedShard]]:
    """The tasks whose shards are complete, with their shards."""
    if not tasks:
        return
    with ThreadPoolExecutor(LOOKUPS if "://" in tasks[0].output else 1) as pool:
        for task, done in zip(tasks, pool.map(lambda task: finished_shard(task.output, task.name), tasks)):
            if done:
                yield task, done


def unpublish(tasks: list[Task]) -> None:
    """Remove the descriptions of shards before these are rebuilt, so that nothing looks complete."""
    remove(join_url(tasks[0].output, "corpus.json"))
    with ThreadPoolExecutor(LOOKUPS) as pool:
        indices = [join_url(task.output, task.name.removesuffix(".tar") + ".parquet") for task in tasks]
        list(pool.map(remove, indices))
