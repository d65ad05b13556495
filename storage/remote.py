"""Bytes of objects in a remote folder: many requests at once, tried again, hedged, and within a deadline."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import fsspec
import tenacity
from fsspec.asyn import get_loop
from fsspec.implementations.local import LocalFileSystem

from loaders.config import RemoteReads
from sharding.shards.schema import join_url
from storage.addresses import Address, sign
from storage.failures import GoneError, TransientError, explain, public_url
from storage.http import Answer, HttpClient
from storage.limits import gate_of_process
from storage.ranges import ByteRange

log = logging.getLogger("loaders")

LATENCIES = 256  # last requests of a size class from which the percentile is taken
ENOUGH_LATENCIES, ANEW = 20, 16  # so many at least, and it is taken anew after so many more
SILENCE = 5.0  # seconds without a part after which the log hears of its tries, and not more often
LEAST_PATIENCE = 0.05  # seconds before a second request, however fast the store
HEDGED_SHARE, HEDGED_FREE = 0.1, 16  # of the requests at most: a store slow as a whole is not asked twice as much

# Clients that a fork brought from the parent: collected as garbage, they would end the parent's connections.
INHERITED: list[tuple[Any, ...]] = []

Result = TypeVar("Result")


@dataclass
class Waiting:
    """A part that is being read: since when, how often it was tried, and what went wrong last."""

    part: ByteRange
    since: float = field(default_factory=time.monotonic)
    tries: int = 0
    last: str = ""


class RemoteStore:
    """Reads parts of the objects under a URL; safe to use from several threads, and in a child after a fork.

    S3, GCS and HTTP are read by one HTTP client, with addresses that fsspec's file systems sign: their own reading
    costs two times the CPU time a request and more, and hides Retry-After. Everything else is read through fsspec.

    counters: requests (those sent, hedges and repetitions too), retries, hedges, hedges_won, bytes_fetched.
    """

    def __init__(self, url: str, options: dict[str, Any], settings: RemoteReads) -> None:
        self.url, self._url, self.options, self.settings = public_url(url), url, options, settings
        self.counters: Counter[str] = Counter()
        self._told = -math.inf  # when the log heard last of a part that does not come
        self._process = 0
        self._filesystem: Any = None
        self._lock = threading.Lock()
        self._client: HttpClient | None = None
        self._try_seconds = min(settings.try_seconds, settings.deadline)
        self._calls: set[Future[Any]] = set()
        self._waiting: dict[int, Waiting] = {}

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """The parts' bytes, read at the same time; fewer where an object ends before.

        Raises:
            FileNotFoundError, PermissionError, OSError: at once, when no repetition would help.
            TimeoutError: one of them was not read within the deadline. CancelledError: `cancel` was called.
        """
        return self._run(self._all(ranges)) if ranges else []

    def cancel(self) -> None:
        """End all reads under way; their callers get CancelledError."""
        with self._lock:  # a call that has begun is known: `_run` adds it before it lets go
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def pending(self) -> list[str]:
        """What is being waited for: URL, bytes, seconds, tries."""
        now = time.monotonic()
        return [
            f"{join_url(self.url, str(item.part))}: {now - item.since:.1f} s, try {item.tries}"
            + (f", last: {item.last}" if item.last else "")
            for item in sorted(self._waiting.values(), key=lambda item: item.since)
        ]

    def close(self) -> None:
        """End reads and connections; a later read makes new ones."""
        with self._lock:
            calls = list(self._calls)
            if self._process != os.getpid():
                return  # what a parent left is kept, see INHERITED
            client, self._client, self._process = self._client, None, 0
        for call in calls:
            call.cancel()
        if client is not None:
            client.close()

    def _run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run it where fsspec runs, and wait."""
        with self._lock:
            if self._process != os.getpid():
                self._connect()
            call = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._calls.add(call)
        try:
            return call.result()
        except BaseException:
            call.cancel()  # of use where this thread was interrupted
            raise
        finally:
            self._calls.discard(call)

    def _connect(self) -> None:
        """Make the clients of this process."""
        if self._process:
            INHERITED.append((self._client, self._filesystem))
        self._filesystem, self._root = fsspec.url_to_fs(self._url, **self.options)
        self._loop = self._filesystem.loop if self._filesystem.async_impl else get_loop()
        self._client, self._waiting, self._calls = None, {}, set()
        self._gate = gate_of_process(self.settings.connections, self.settings.requests_per_second)
        self._addresses: dict[str, Address] = {}
        self._latencies = defaultdict[int, Latencies](lambda: Latencies(self.settings.hedge_percentile))
        self._process = os.getpid()

    async def _all(self, parts: Sequence[ByteRange]) -> list[bytes]:
        tasks = [asyncio.ensure_future(self._patiently(part)) for part in parts]
        try:
            return await asyncio.gather(*tasks)
        finally:
            end(tasks)

    async def _patiently(self, part: ByteRange) -> bytes:
        """A part, tried again as long as that may help and the deadline allows."""
        waiting = Waiting(part)
        self._waiting[id(waiting)] = waiting
        try:
            async with self._gate:  # our own bounds are not the store's fault: the deadline counts from here
                began = time.monotonic()
                waiting.tries = 1
                try:
                    return await self._try(part)
                except TransientError as error:
                    failure = error
            return await self._again(waiting, failure, self.settings.deadline - (time.monotonic() - began))
        except GoneError as error:
            raise error.told_of(join_url(self.url, part.name)) from None
        finally:
            del self._waiting[id(waiting)]

    async def _again(self, waiting: Waiting, failure: TransientError, seconds: float) -> bytes:
        """A part whose first try failed; that one is the first of tenacity's too, whose care costs as much as a try."""
        try:
            async with asyncio.timeout(seconds) as limit:
                async for attempt in tenacity.AsyncRetrying(
                    retry=tenacity.retry_if_exception_type(TransientError),
                    wait=wait_as_told,
                    stop=lambda state: state.upcoming_sleep >= seconds_to(limit),
                    before_sleep=lambda state: self._note_retry(waiting, state),
                    reraise=True,
                ):
                    with attempt:
                        if attempt.retry_state.attempt_number == 1:
                            raise failure
                        left = seconds_to(limit)
                        limit.reschedule(None)
                        async with self._gate:
                            limit.reschedule(asyncio.get_running_loop().time() + left)
                            waiting.tries += 1
                            return await self._try(waiting.part)
        except TransientError as error:
            raise self._too_late(waiting, str(error)) from None
        except TimeoutError:
            raise self._too_late(waiting, waiting.last) from None
        raise AssertionError("tenacity ends with a result or an error")

    def _note_retry(self, waiting: Waiting, state: tenacity.RetryCallState) -> None:
        self.counters["retries"] += 1
        assert state.outcome is not None
        waiting.last = str(state.outcome.exception())
        now = time.monotonic()
        if now - max(waiting.since, self._told) > SILENCE:
            self._told = now
            log.warning(
                "%s: %d tries in %.0f s, the last: %s; tried again until remote.deadline=%g s",
                join_url(self.url, str(waiting.part)), waiting.tries, now - waiting.since,
                waiting.last, self.settings.deadline,
            )  # fmt: skip

    def _too_late(self, waiting: Waiting, reason: str) -> TimeoutError:
        return TimeoutError(
            f"{join_url(self.url, str(waiting.part))} was not read within "
            f"remote.deadline={self.settings.deadline:g} s ({waiting.tries} tries); the last: {reason}"
        )

    async def _try(self, part: ByteRange) -> bytes:
        """One try. Raises TransientError or GoneError."""
        try:
            return await self._hedged(part, await self._address(part.name))
        except PermissionError:  # the signature may have grown old with the credentials behind it
            self._addresses.pop(part.name, None)  # another part may have done so
        try:
            return await self._hedged(part, await self._address(part.name))
        except PermissionError as error:
            raise explain(error) from None

    async def _hedged(self, part: ByteRange, address: Address | None) -> bytes:
        """A part, asked for a second time when the answer takes longer than almost all others did."""
        latencies, began = self._latencies[size_class(part)], time.monotonic()
        first = self._ask(part, address)
        second: list[asyncio.Task[bytes]] = []
        late = None  # a timer: asyncio.wait costs a tenth of a request
        if latencies.patience is not None:
            late = first.get_loop().call_later(latencies.patience, self._hedge, part, address, first, second)
        try:
            data = await first
            if not first.given:
                latencies.note(time.monotonic() - began)
        except TransientError:
            if not second:
                raise
            data = await second[0]
            self.counters["hedges_won"] += 1
        finally:
            if late is not None:
                late.cancel()
            end(second)
        self.counters["bytes_fetched"] += len(data)
        return data

    def _hedge(
        self, part: ByteRange, address: Address | None, first: Answer, second: list[asyncio.Task[bytes]]
    ) -> None:
        """Ask for the second time, unless the store is slow as a whole; what comes is the first one's answer."""
        few = self.counters["hedges"] < HEDGED_FREE + HEDGED_SHARE * self.counters["requests"]
        if first.done() or not (few and self._gate.is_free()):
            return
        self.counters["hedges"] += 1
        second.append(asyncio.ensure_future(self._ask_once_more(part, address)))
        second[0].add_done_callback(lambda task: self._give(first, task))

    async def _ask_once_more(self, part: ByteRange, address: Address | None) -> bytes:
        async with self._gate:
            began = time.monotonic()
            data = await self._ask(part, address)
            self._latencies[size_class(part)].note(time.monotonic() - began)
            return data

    def _give(self, first: Answer, task: asyncio.Task[bytes]) -> None:
        if not (first.done() or task.cancelled() or task.exception()):
            self.counters["hedges_won"] += 1
            first.give(task.result())

    def _ask(self, part: ByteRange, address: Address | None) -> Answer:
        """One request. It raises TransientError or GoneError, or PermissionError: see `_try`."""
        self.counters["requests"] += 1
        if address is None:
            return TaskAnswer(asyncio.ensure_future(self._bounded(self._ask_filesystem(part))))
        client = self._client
        if client is None:
            if self._process != os.getpid():
                raise asyncio.CancelledError  # closed meanwhile
            loop = asyncio.get_running_loop()
            client = self._client = HttpClient(loop, self.settings.connections, self._try_seconds)
        return client.get(address, part.start, part.end)

    async def _ask_filesystem(self, part: ByteRange) -> bytes:
        path = join_url(self._root, part.name)
        limits = {} if part.end is None else {"start": part.start, "end": part.end}
        if self._filesystem.async_impl:
            return await self._filesystem._cat_file(path, **limits)
        return await asyncio.to_thread(self._filesystem.cat_file, path, **limits)

    async def _bounded(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What a file system of fsspec does, within the time of a try. Raises TransientError or GoneError."""
        try:
            async with asyncio.timeout(self._try_seconds):
                return await work
        except TimeoutError:
            raise TransientError(f"no answer within {self._try_seconds:g} s (remote.try_seconds)") from None
        except Exception as error:
            raise explain(error) from None

    async def _address(self, name: str) -> Address | None:
        """Where to ask for an object over HTTP; None where only fsspec knows."""
        known = self._addresses.get(name)
        if known is not None and time.monotonic() < known.until:
            return known
        found = await self._bounded(sign(self._filesystem, join_url(self._root, name)))
        if found is not None:
            self._addresses[name] = found
        return found


class Latencies:
    """How long the last requests of a size class took, and after how long one is a straggler.

    patience: seconds; None while too few have been seen.
    """

    def __init__(self, percentile: float) -> None:
        self.patience: float | None = None
        self._percentile, self._last, self._noted = percentile, deque[float](maxlen=LATENCIES), 0

    def note(self, seconds: float) -> None:
        """A request took so long."""
        self._last.append(seconds)
        self._noted += 1
        if self._percentile and self._noted >= ENOUGH_LATENCIES and self._noted % ANEW == 0:
            found = sorted(self._last)[int(self._percentile * (len(self._last) - 1))]
            self.patience = max(LEAST_PATIENCE, found)


def seconds_to(limit: asyncio.Timeout) -> float:
    """Seconds until a time limit."""
    when = limit.when()
    return math.inf if when is None else when - asyncio.get_running_loop().time()


class TaskAnswer(Answer):
    """What a task gives."""

    def __init__(self, task: asyncio.Task[bytes]) -> None:
        super().__init__(loop=task.get_loop())
        self.task = task
        task.add_done_callback(self._take)

    def stop(self) -> None:
        """End the task."""
        self.task.cancel()

    def _take(self, task: asyncio.Task[bytes]) -> None:
        if task.cancelled():
            self.cancel()
        elif self.done():
            task.exception()  # known, and not logged as never seen
        elif error := task.exception():
            self.set_exception(error)
        else:
            self.set_result(task.result())


def end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel what still runs; the errors of the others are known."""
    for task in tasks:
        if task.done() and not task.cancelled():
            task.exception()
        task.cancel()


def is_local(url: str, options: dict[str, Any]) -> bool:
    """Whether a URL is a folder of this machine."""
    return isinstance(fsspec.url_to_fs(url, **options)[0], LocalFileSystem)


def size_class(part: ByteRange) -> int:
    """Requests of one class take about as long: their sizes differ by less than 8."""
    return -1 if part.end is None else part.size.bit_length() // 3


def wait_as_told(state: tenacity.RetryCallState) -> float:
    """Seconds before the next try: what the server said, or twice as long each time, at random."""
    error = state.outcome.exception() if state.outcome is not None else None
    told = error.retry_after if isinstance(error, TransientError) else 0.0
    return told + BACKOFF(state)


BACKOFF = tenacity.wait_random_exponential(multiplier=0.1, max=20)
