"""Single flight: one of several threads or processes makes a value, and the others wait for it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

POLL = 0.03  # seconds between two tries to get a lock

log = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class SingleFlight(Generic[Key, Value]):
    """Makes the values of keys, each in one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[Key, Future[Value]] = {}

    def run(
        self, keys: Sequence[Key], make: Callable[[list[Key]], Iterable[tuple[Key, Value]]]
    ) -> tuple[dict[Key, Value], int]:
        """The value of each key, and how many of them another thread made.

        make: gives the values of the keys that no other thread is making, in any order. Its error is raised here and
        in the threads that wait for what it has not given.
        """
        own: list[Key] = []
        futures: dict[Key, Future[Value]] = {}
        with self._lock:
            for key in keys:
                if key not in self._running:
                    self._running[key] = Future()
                    own.append(key)
                futures[key] = self._running[key]
        try:
            for key, value in make(own) if own else ():
                futures[key].set_result(value)
        except BaseException as error:
            for key in own:
                if not futures[key].done():
                    futures[key].set_exception(error)
            raise
        finally:
            with self._lock:
                for key in own:
                    del self._running[key]
        return {key: future.result() for key, future in futures.items()}, len(futures) - len(own)


class LastUsed(Generic[Key, Value]):
    """The values of `make` for the last used `capacity` keys. Safe for threads."""

    def __init__(self, make: Callable[[Key], Value], capacity: int) -> None:
        self._make, self._capacity = make, capacity
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()
        self._flight: SingleFlight[Key, Value] = SingleFlight()

    def get(self, key: Key) -> Value:
        """The value of a key; an error of `make` is raised, and the next call tries again."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        return self._flight.run([key], lambda keys: [(key, self._fill(key)) for key in keys])[0][key]

    def _fill(self, key: Key) -> Value:
        with self._lock:
            if key in self._values:  # made since `get` looked
                return self._values[key]
        value = self._make(key)
        with self._lock:
            self._values[key] = value
            while len(self._values) > self._capacity:
                self._values.popitem(last=False)
        return value

    def __contains__(self, key: Key) -> bool:
        return key in self._values

    def clear(self) -> None:
        """Forget all values."""
        with self._lock:
            self._values.clear()


@contextmanager
def process_lock(
    path: Path, seconds: float = math.inf, cancelled: Callable[[], bool] = lambda: False
) -> Iterator[bool]:
    """Hold the lock of a file against other processes and threads, or have waited `seconds` for it.

    Yields whether another one held it. On a full disk, or a file system without locks, there is no waiting. A lock ends
    with its process. Raises CancelledError when `cancelled` becomes true while it waits.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        log.warning("%s cannot be used, so processes do not share this work (%s)", path, error.strerror)
        yield False
        return
    try:
        began, waited = time.monotonic(), False
        while not _try_lock(descriptor) and time.monotonic() - began < seconds:
            if cancelled():
                raise CancelledError
            waited = True
            time.sleep(POLL * (0.5 + random.random()))
        yield waited
    finally:
        os.close(descriptor)  # and with it the lock


def _try_lock(descriptor: int) -> bool:
    """Lock a file, unless another process or thread has it locked; True where the file system has no locks."""
    with contextlib.suppress(OSError):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
