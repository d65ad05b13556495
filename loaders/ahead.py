"""Runs an iterator in a thread of its own, a bounded number of items ahead of whoever takes them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Ahead(Iterator[Item], Generic[Item]):
    """The items of `source`, made by a thread at most `depth` ahead; its errors are raised where the items are taken.

    waited: seconds that the taker has waited for items so far.
    """

    def __init__(self, source: Generator[Item, None, None], depth: int, name: str) -> None:
        self.waited = 0.0
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
                self._changed.wait()
            self.waited += time.perf_counter() - started
            if self._stopped:
                raise StopIteration
            if self._items:
                self._changed.notify_all()
                return self._items.popleft()
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
        except BaseException as raised:  # handed to the taker
            error = raised
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def _put(self, item: Item) -> bool:
        """Wait for room and add an item; False when nobody wants it any more."""
        with self._changed:
            while len(self._items) >= self._depth and not self._stopped:
                self._changed.wait()
            if not self._stopped:
                self._items.append(item)
                self._changed.notify_all()
            return not self._stopped

    def stop(self) -> None:
        """Tell the thread to end after the item it is making; returns at once."""
        with self._changed:
            self._stopped = True
            self._items.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """Stop, and wait for the thread's end."""
        self.stop()
        self._thread.join()
