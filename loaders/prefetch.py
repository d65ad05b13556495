"""Runs a stage of the loader in a thread, a bounded number of items ahead of its consumer."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from typing import Generic, TypeVar

from runtime.threads import thread_frames

log = logging.getLogger("loaders")

Item = TypeVar("Item")
Result = TypeVar("Result")


class StalledError(RuntimeError):
    """No batch arrived within `stall_timeout`; the log has every thread's stack."""


class Prefetcher(Iterator[Item], Generic[Item]):
    """The items of `source`, made by a thread at most `depth` ahead; its errors are raised in the consumer.

    waited: total seconds that the consumer has waited for items.
    stall_timeout: seconds without an item until StalledError is raised; 0: never. pending: names what is waited for.
    """

    def __init__(
        self,
        source: Generator[Item, None, None],
        depth: int,
        name: str,
        stall_timeout: float = 0.0,
        pending: Callable[[], Sequence[str]] = list,
    ) -> None:
        self.waited = 0.0
        self._stall_timeout, self._pending = stall_timeout, pending
        self._began = self._empty_since = time.perf_counter()
        self._empty_seconds = 0.0
        self._source, self._depth = source, max(1, depth)
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._stopped = self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __next__(self) -> Item:
        """The next item; StopIteration after the last one, and as soon as `stop` was called."""
        started = time.perf_counter()
        with self._changed:
            while not (self._items or self._ended or self._stopped):
                left = self._stall_timeout - (time.perf_counter() - started)
                if self._stall_timeout and left <= 0:
                    raise stalled(self._thread.name, self._stall_timeout, self._pending())
                self._changed.wait(left if self._stall_timeout else None)
            self.waited += time.perf_counter() - started
            if self._stopped:
                raise StopIteration
            if self._items:
                self._changed.notify_all()
                item = self._items.popleft()
                if not self._items:
                    self._empty_since = time.perf_counter()
                return item
            if self._error is not None:
                raise self._error
            raise StopIteration

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._source:
                if not self._put(item):
                    break
            self._source.close()
        except BaseException as raised:  # for the consumer
            error = raised
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def _put(self, item: Item) -> bool:
        """Wait for room and add an item; False after `stop`."""
        with self._changed:
            while len(self._items) >= self._depth and not self._stopped:
                self._changed.wait()
            if not self._stopped:
                if not self._items:
                    self._empty_seconds += time.perf_counter() - self._empty_since
                self._items.append(item)
                self._changed.notify_all()
            return not self._stopped

    def readiness(self) -> float:
        """The share of the time since the start in which an item was ready."""
        with self._changed:
            now = time.perf_counter()
            empty = self._empty_seconds + (0 if self._items else now - self._empty_since)
            return 1 - min(1.0, empty / max(now - self._began, 1e-9))

    def stop(self) -> None:
        """Tell the thread to end after the item it is making; returns at once."""
        with self._changed:
            self._stopped = True
            self._items.clear()
            self._changed.notify_all()

    def ended(self, seconds: float) -> bool:
        """Whether the thread ends within that time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Stop, and wait for the thread's end."""
        self.stop()
        self._thread.join()


def overlapped(
    work: Callable[[Item], Result], items: Iterable[Item], pool: Executor, at_once: int
) -> Generator[Result, None, None]:
    """`work` of each item, in order; the pool works on `at_once` of them at the same time."""
    running: deque[Future[Result]] = deque()
    try:
        for item in items:
            running.append(pool.submit(work, item))
            while len(running) >= at_once:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()
        wait(running)


def stalled(name: str, seconds: float, pending: Sequence[str]) -> StalledError:
    """Log the stack of every thread; returns the error that names what is waited for."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = (
        f"thread {names.get(number, number)}:\n{''.join(traceback.format_stack(frame))}"
        for number, frame in thread_frames().items()
    )
    log.critical("%s produced nothing for %.0f s; thread stacks:\n%s", name, seconds, "\n".join(stacks))
    what = "; ".join(pending) or "no read is in progress: see the threads' stacks in the log"
    return StalledError(f"{name} produced nothing for stall_timeout={seconds:g} s; waiting for: {what}")
