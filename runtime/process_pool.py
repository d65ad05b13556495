"""Runs tasks in processes; their number changes speed and nothing else."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, TypeVar

from runtime.errors import WorkerError

Advance = Callable[[int, int, int], None]  # numbers of items that succeeded, of items that failed, of bytes
Task = TypeVar("Task")
Result = TypeVar("Result")

_counts: Any = None  # in a worker process: the counters it shares with the parent


def run_tasks(
    function: Callable[[Task, Advance], Result], tasks: Iterable[Task], workers: int, advance: Advance
) -> Iterator[tuple[Task, Result]]:
    """(task, `function(task, advance)`) of each task as it is finished, on `workers` processes.

    `function` is a module's function, tasks and results can be pickled. Tasks are drawn as they are needed. `advance`
    is called in this process, every half second and at the end of each task; with one worker all runs in this process.

    Raises:
        WorkerError: a worker process died. Whatever `function` raises.
    """
    if workers <= 1:
        for task in tasks:
            yield task, function(task, advance)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    counts = context.Array("q", 3)
    waiting = iter(tasks)
    pool = ProcessPoolExecutor(workers, context, start_worker, (counts,))
    with pool, ending_children(), interrupts_noted() as interrupts:

        def submit(number: int) -> dict[Future[Result], Task]:
            return {pool.submit(run_in_worker, function, task): task for task in itertools.islice(waiting, number)}

        # A worker that gets Ctrl-C would die noisily; this process ends them.
        with interrupts_held_back(), lost_workers():
            pending = submit(2 * workers)
        seen = [0, 0, 0]
        while pending:
            done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            if interrupts:
                raise KeyboardInterrupt
            now = [counts[0], counts[1], counts[2]]
            advance(now[0] - seen[0], now[1] - seen[1], now[2] - seen[2])
            seen = now
            for future in done:
                with lost_workers():
                    result = future.result()
                yield pending.pop(future), result
            with lost_workers():  # one may die between two tasks
                pending |= submit(2 * workers - len(pending))


@contextmanager
def lost_workers() -> Iterator[None]:
    """Raise WorkerError when the pool reports that a worker process died."""
    try:
        yield
    except BrokenProcessPool:
        raise WorkerError(
            "a worker process died (out of memory, killed, or crashed in a decoder); finished shards are kept: run "
            "the same command again to continue, with fewer --workers if memory is short"
        ) from None


@contextmanager
def interrupts_noted() -> Iterator[list[int]]:
    """Yield a list that Ctrl-C also adds to: the KeyboardInterrupt is lost where Python drops exceptions.

    It does so in the callback of a weak reference, as futures have them.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block; processes started inside never get it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # new processes inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if caught:
        raise KeyboardInterrupt


@contextmanager
def ending_children() -> Iterator[None]:
    """End the processes started inside, at once, when an exception leaves the block."""
    others: set[BaseProcess] = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise


def start_worker(counts: Any) -> None:
    """Prepare a worker process: it ends with its parent, however that ends."""
    global _counts
    _counts = counts
    import cv2

    cv2.setNumThreads(1)  # there are as many processes as cores
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Wait for the parent process to end, then end this one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_in_worker(function: Callable[[Task, Advance], Result], task: Task) -> Result:
    """Run `function` in a worker process; its reports go to the shared counters."""

    def advance(good: int, bad: int, size: int) -> None:
        with _counts.get_lock():
            for index, more in enumerate((good, bad, size)):
                _counts[index] += more

    return function(task, advance)
