"""Who builds the shards: processes of this machine, a Ray cluster, or one of several jobs that share the work."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from runtime.errors import UserError
from runtime.progress import Progress
from sharding.executors.build_shard import build_shard
from sharding.executors.process_pool import Advance, run_tasks
from sharding.executors.ray_cluster import run_on_ray
from sharding.shards.failures import FailureLog
from sharding.shards.output import remove
from sharding.shards.plan import Task
from sharding.shards.schema import ShardInfo
from sharding.shards.writing import FinishedShard, finished_shard
from storage.urls import join_url

ENGINES = ("processes", "ray")
ASKING = 16  # shards asked for at once in a store
PART = re.compile(r"(\d+)/(\d+)")

log = logging.getLogger("sharding")


@dataclass(frozen=True)
class Engine:
    """How shards are built; it changes no byte of them.

    name: `processes` of this machine, or `ray`: tasks on a running Ray cluster, one a core.
    part: `2/8`, this is the second of eight jobs on one output, and whoever is last describes the corpus.
    finish: build nothing, describe what the parts have built.
    """

    name: str = "processes"
    part: str = ""
    finish: bool = False

    def check(self) -> None:
        """Raise ValueError, with the remedy, for settings that cannot work."""
        if self.name not in ENGINES:
            raise UserError(f"--engine is {self.name!r}, must be one of {', '.join(ENGINES)}")
        if self.part and not ((match := PART.fullmatch(self.part)) and 1 <= int(match[1]) <= int(match[2])):
            raise UserError(f"--part is {self.part!r}, must be I/N with I from 1 to N, such as 2/8")
        if self.part and self.finish:
            raise UserError("--part builds and --finish does not: give one of them")

    def share(self, tasks: list[Task]) -> list[Task]:
        """Those of the tasks that fall to this job."""
        if self.finish:
            return []
        if not self.part:
            return tasks
        part, parts = (int(number) for number in self.part.split("/"))
        return [task for task in tasks if task.number % parts == part - 1]

    def run(self, tasks: list[Task], workers: int, advance: Advance) -> Iterator[tuple[Task, FinishedShard]]:
        """(task, shard) of each task as it is finished."""
        if not tasks:
            return iter(())
        if self.name == "ray":
            return run_on_ray(build_shard, tasks, advance)
        return run_tasks(build_shard, tasks, min(workers, len(tasks)), advance)


def pack(
    tasks: list[Task], engine: Engine, workers: int, retry_failed: bool, failures: FailureLog, progress: Progress
) -> tuple[list[ShardInfo], int]:
    """The complete shards, in order, and the annotation rows in them; those already complete are not built again.

    They are all of them, unless this is one job of several and others are not done.

    Raises:
        ValueError: `engine.finish`, and shards are missing.
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
    pending = engine.share([task for task in tasks if task.number not in shards])
    if pending:
        unpublish(pending)
    for task, shard in engine.run(pending, workers, progress.advance):
        keep(task.number, shard)
    for task, done in finished([task for task in tasks if task.number not in shards]):  # by other jobs, meanwhile
        keep(task.number, done)
    missing = [task.name for task in tasks if task.number not in shards]
    if missing and engine.finish:
        raise UserError(
            f"{len(missing)} of {len(tasks)} shards are not complete in {tasks[0].output} ({', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}): run the parts that build them again, then --finish"
        )
    if missing:
        log.info("part %s is done; %d of %d shards are left to other parts", engine.part, len(missing), len(tasks))
    return [shards[number] for number in sorted(shards)], rows


def finished(tasks: list[Task]) -> Iterator[tuple[Task, FinishedShard]]:
    """Those of the tasks whose shards are complete, with these."""
    if not tasks:
        return
    with ThreadPoolExecutor(ASKING if "://" in tasks[0].output else 1) as pool:
        for task, done in zip(tasks, pool.map(lambda task: finished_shard(task.output, task.name), tasks)):
            if done:
                yield task, done


def unpublish(tasks: list[Task]) -> None:
    """Before shards are built anew: what describes older ones goes first, so that nothing looks complete."""
    remove(join_url(tasks[0].output, "corpus.json"))
    with ThreadPoolExecutor(ASKING) as pool:
        indices = [join_url(task.output, task.name.removesuffix(".tar") + ".parquet") for task in tasks]
        for _ in pool.map(remove, indices):
            pass
