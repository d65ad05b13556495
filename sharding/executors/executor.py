"""Executors that build shards: processes of this machine or a Ray cluster; all shards or one job part."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.errors import UserError
from runtime.flags import flag

if TYPE_CHECKING:
    from runtime.process_pool import Advance
    from sharding.shards.plan import Task
    from sharding.shards.writing import FinishedShard

    Run = Callable[[list[Task], int, Advance], Iterator[tuple[Task, FinishedShard]]]  # tasks, workers, progress

PART = re.compile(r"(\d+)/(\d+)")


def run_in_processes(tasks: list[Task], workers: int, advance: Advance) -> Iterator[tuple[Task, FinishedShard]]:
    """(task, shard) of each task as it is finished, in processes of this machine."""
    from runtime.process_pool import run_tasks
    from sharding.executors.build_shard import build_shard

    return run_tasks(build_shard, tasks, min(workers, len(tasks)), advance)


def run_on_cluster(tasks: list[Task], workers: int, advance: Advance) -> Iterator[tuple[Task, FinishedShard]]:
    """The same on a Ray cluster."""
    from sharding.executors.ray_cluster import run_on_ray

    return run_on_ray(tasks, workers, advance)


EXECUTORS: dict[str, Run] = {"processes": run_in_processes, "ray": run_on_cluster}


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
