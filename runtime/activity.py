"""What this process is doing and when it last made progress, for the watchdog; any package may report it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

REPORT_SECONDS = 1.0


@dataclass(frozen=True)
class Activity:
    """What the main thread does: a task such as `evaluating images`, how far it is with it, since when
    (`time.monotonic`), and the exchange with other ranks that it waits in, such as gather_rows.
    """

    task: str
    position: str
    since: float
    exchange: str = ""

    @property
    def text(self) -> str:
        """Task and position."""
        return f"{self.task}: {self.position}" if self.position else self.task


_present = Activity("starting", "", time.monotonic())


def begin(task: str) -> None:
    """Report that the main thread begins with another task."""
    _set(Activity(task, "", time.monotonic()))


def progress(position: str) -> None:
    """Report how far the main thread is with its task, in a few words.

    To be called at least every few seconds by whatever takes long outside of training steps: a process that reports
    nothing for `stall_seconds` counts as hung.
    """
    _set(replace(_present, position=position, since=time.monotonic()))


@contextmanager
def waiting(exchange: str) -> Iterator[None]:
    """While the main thread waits for other ranks in an exchange: no progress is expected of it then."""
    _set(replace(_present, since=time.monotonic(), exchange=exchange))
    try:
        yield
    finally:
        _set(replace(_present, since=time.monotonic(), exchange=""))


@contextmanager
def trusted(position: str) -> Iterator[None]:
    """While a library works that reports nothing, and ends by itself where its servers fall silent: a download."""
    over = threading.Event()

    def report() -> None:
        while not over.wait(REPORT_SECONDS):
            progress(position)

    progress(position)
    thread = threading.Thread(target=report, name="activity", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def present_activity() -> Activity:
    """The last report."""
    return _present


def _set(activity: Activity) -> None:
    global _present
    _present = activity
