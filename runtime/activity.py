"""What the main thread does and when it last made progress, for the watchdog; any package reports it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

REPORT_SECONDS = 1.0


@dataclass(frozen=True)
class Activity:
    """A task such as `evaluating images` and the position in it, when that was reported (`time.monotonic`), and the
    collective that the main thread waits in, such as gather_rows.
    """

    task: str
    position: str
    since: float
    collective: str = ""

    @property
    def text(self) -> str:
        """Task and position."""
        return f"{self.task}: {self.position}" if self.position else self.task


_present = Activity("starting", "", time.monotonic())


def present_activity() -> Activity:
    """The last report."""
    return _present


def begin(task: str) -> None:
    """Report that the main thread begins another task."""
    global _present
    _present = Activity(task, "", time.monotonic())


def progress(position: str) -> None:
    """Report the position in the task, in a few words.

    Whatever takes long outside of training steps calls it every few seconds: a process that reports nothing for
    `stall_seconds` counts as hung.
    """
    _report(position=position)


@contextmanager
def waiting(collective: str) -> Iterator[None]:
    """A block in which the main thread waits for other ranks: the watchdog expects no progress."""
    _report(collective=collective)
    try:
        yield
    finally:
        _report(collective="")


@contextmanager
def keep_alive(position: str) -> Iterator[None]:
    """While a library works that reports no progress and has timeouts of its own, such as a download."""
    done = threading.Event()

    def report() -> None:
        while not done.wait(REPORT_SECONDS):
            progress(position)

    progress(position)
    thread = threading.Thread(target=report, name="activity", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _report(**changes: str) -> None:
    global _present
    _present = replace(_present, since=time.monotonic(), **changes)
