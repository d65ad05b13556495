"""Progress of long work: a bar on a terminal, elsewhere a line of JSON in the log every LOG_EVERY seconds."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

from runtime.units import data_size

LOG_EVERY = 30.0  # seconds

log = logging.getLogger(__name__)

T = TypeVar("T")


def counted(rows: Iterable[T], log_every: float = LOG_EVERY, stage: str = "annotations") -> Iterator[T]:
    """Pass rows on and show their number, as `Progress` does, where the total is unknown."""
    terminal = sys.stderr.isatty()
    logged = time.monotonic()
    with tqdm(rows, unit="row", desc=stage, disable=not terminal, dynamic_ncols=True) as bar:
        for number, row in enumerate(bar, 1):
            yield row
            if log_every and not terminal and number % 4096 == 0 and time.monotonic() - logged >= log_every:
                logged = time.monotonic()
                log.info(json.dumps({"stage": stage, "done": number}))


class Progress:
    """Counts items done, those that failed, and bytes; use as a context manager.

    On a terminal it is a bar with rate, bytes, failures and time left. Elsewhere each `log_every` seconds, and at the
    end, it logs one JSON object on one line: `stage`, `done`, `total`, `good` under its name (such as packed),
    `failed`, `bytes`, `items_per_s`, `eta_s` (null while unknown). `log_every` 0 logs nothing.
    """

    def __init__(
        self,
        total: int,
        stage: str,
        shown: bool = True,
        unit: str = "item",
        good: str = "packed",
        log_every: float = LOG_EVERY,
    ) -> None:
        self.total, self.stage, self.good_name = total, stage, good
        self.good = self.bad = self.bytes = self.before = 0
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, unit=unit, desc=stage, disable=not (shown and terminal), dynamic_ncols=True)
        self.log_every = log_every if shown and not terminal else 0.0
        self.started = self.logged = time.monotonic()

    @property
    def done(self) -> int:
        """Items done, failed ones included."""
        return self.good + self.bad

    def skip(self, good: int, bad: int, size: int) -> None:
        """Count what an earlier run did; it does not enter the rate."""
        self.before += good + bad
        self.bar.initial = self.before
        self.advance(good, bad, size)

    def advance(self, good: int, bad: int, size: int) -> None:
        """Count more items that succeeded, that failed, and their bytes."""
        self.good, self.bad, self.bytes = self.good + good, self.bad + bad, self.bytes + size
        failed = f", {self.bad:,} failed" if self.bad else ""
        self.bar.set_postfix_str(f"{data_size(self.bytes)}{failed}", refresh=False)
        self.bar.update(good + bad)
        if self.log_every and time.monotonic() - self.logged >= self.log_every:
            self.write_line()

    def write_line(self) -> None:
        """Log the progress."""
        self.logged = time.monotonic()
        fresh, seconds = self.done - self.before, self.logged - self.started
        rate = fresh / seconds if seconds > 0 else 0.0
        line = {
            "stage": self.stage,
            "done": self.done,
            "total": self.total,
            self.good_name: self.good,
            "failed": self.bad,
            "bytes": self.bytes,
            "items_per_s": round(rate, 2),
            "eta_s": round((self.total - self.done) / rate, 1) if rate else (0.0 if self.done == self.total else None),
        }
        log.info(json.dumps(line))

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the bar, or log a last line."""
        self.bar.close()
        if self.log_every:
            self.write_line()
