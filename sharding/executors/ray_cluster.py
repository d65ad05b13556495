"""Shards built on a running Ray cluster: one task per shard; tasks of a failed node are retried on another."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2

import runtime
import sharding
import storage
from runtime.errors import AccessError, MissingError, UserError, WorkerError
from runtime.process_pool import Advance
from sharding.executors.build_shard import build_shard
from sharding.media.sources import check_root
from sharding.shards.plan import Task
from sharding.shards.writing import FinishedShard

RETRIES = 5  # of a shard whose node or process died; a file that kills its decoder must not be retried for ever
TASKS_A_CORE = 2  # handed to Ray at once


def run_on_ray(tasks: list[Task], workers: int, advance: Advance) -> Iterator[tuple[Task, FinishedShard]]:
    """(task, shard) of each task as it is finished on the cluster that RAY_ADDRESS names, or that this machine is in.

    `workers` does not count: the cluster's cores do.

    Raises ValueError: Ray is not installed, or there is no cluster. OSError: a shard cannot be built.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray on every node: pip install 'singularity-at-scale[ray]'") from None
    connect(ray)
    try:
        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(build_on_node)
        waiting = iter(tasks)
        pending: dict[Any, Task] = {}
        while True:
            room = TASKS_A_CORE * int(ray.cluster_resources().get("CPU", 1)) - len(pending)  # nodes come and go
            for task in itertools.islice(waiting, max(room, 1 - len(pending), 0)):
                pending[remote.remote(replace(task, items=list(task.items)))] = task
            if not pending:
                return
            for done in ray.wait(list(pending), timeout=1.0)[0]:
                shard = result(ray, done, pending[done])
                advance(shard.info.samples, len(shard.failures), shard.info.bytes)
                yield pending.pop(done), shard
    finally:
        ray.shutdown()


def connect(ray: Any) -> None:
    """Join the cluster; its nodes get this code, so that they need only the packages that it uses."""
    address = os.environ.get("RAY_ADDRESS", "auto")
    modules = [str(Path(str(room.__file__)).resolve().parent) for room in (runtime, storage, sharding)]
    try:
        # Ray lets its workers import from the folder that this process is in: a file there must not replace a module.
        with contextlib.chdir("/"):
            ray.init(address=address, log_to_driver=False, logging_level="warning", runtime_env={"py_modules": modules})
    except ConnectionError as error:
        remedy = "start one with `ray start --head`, or set RAY_ADDRESS"
        raise UserError(f"--engine ray finds no cluster at {address} ({error}): {remedy}") from None


def result(ray: Any, done: Any, task: Task) -> FinishedShard:
    """A finished task's shard; raises the error that ended it on its node."""
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from None
    except ray.exceptions.RaySystemError as error:
        raise AccessError(f"{task.name} cannot be built: {error}") from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
        raise WorkerError(
            f"{task.name} cannot be built: its process died {RETRIES + 1} times ({error}); finished shards are kept"
        ) from None


def build_on_node(task: Task) -> FinishedShard:
    """`build_shard` as a task of a node; local media and outputs must be on folders that all nodes share."""
    cv2.setNumThreads(1)  # there are as many tasks as cores
    try:
        check_root(task.media_root)
    except FileNotFoundError as error:
        raise MissingError(f"{error} (on node {socket.gethostname()}; a folder must be shared by all)") from None
    if "://" in task.output:
        with tempfile.TemporaryDirectory(prefix="singularity-build-") as scratch:
            return build_shard(replace(task, scratch=scratch))
    if not Path(task.scratch).is_dir():
        raise MissingError(
            f"{task.output} is not there on node {socket.gethostname()}: give a folder that all nodes share, or a store"
        )
    return build_shard(task)
