"""Byte ranges of objects in a remote folder: many requests at once, retried, hedged, and within a deadline."""

from __future__ import annotations

import asyncio
import contextlib
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
from fsspec.asyn import get_loop

from storage.addresses import Address, sign
from storage.http import HttpClient, Response
from storage.limits import RemoteReads, rate_limiter
from storage.policy import RetryPolicy, StoreError, describe_error
from storage.ranges import ByteRange
from storage.urls import join_url, public_url

log = logging.getLogger(__name__)

POLICY = RetryPolicy(attempts=0, first_backoff=0.1, longest_retry_after=math.inf)  # the deadline limits them
LATENCIES = 256  # last requests of a size class that the percentile is computed from
MIN_LATENCIES, UPDATE_EVERY = 20, 16  # requests before the first percentile, and between two of them
WARN_SECONDS = 5.0  # until a read that fails is logged, and between two warnings
MIN_HEDGE_SECONDS = 0.05  # before a second request, however fast the store
MAX_HEDGED_SHARE, FREE_HEDGES = 0.1, 16  # limits of hedged requests: a store that is slow as a whole gets no more load

# Clients inherited through a fork. Collecting them as garbage would close the parent's connections.
_inherited: list[tuple[Any, ...]] = []

Result = TypeVar("Result")


@dataclass
class PendingRead:
    """A byte range that is being read: since when, how often it was tried, and the last error."""

    wanted: ByteRange
    since: float = field(default_factory=time.monotonic)
    tries: int = 0
    last: str = ""


class RemoteStore:
    """Reads the objects under a URL; safe to use from several threads, and in a child after a fork.

    S3, GCS and HTTP are read by one HTTP client, with addresses that fsspec's file systems sign: reading through these
    takes at least twice the CPU time per request and hides Retry-After. Everything else is read through fsspec.

    counters: requests (hedges and retries included), retries, hedges, hedges_won, bytes_fetched.
    """

    def __init__(self, url: str, options: dict[str, Any], settings: RemoteReads) -> None:
        self.url, self._url, self.options, self.settings = public_url(url), url, options, settings
        self.counters: Counter[str] = Counter()
        self._warned = -math.inf  # when the log had the last warning
        self._process = 0
        self._filesystem: Any = None
        self._lock = threading.Lock()
        self._client: HttpClient | None = None
        self._try_seconds = min(settings.try_seconds, settings.deadline)
        self._calls: set[Future[Any]] = set()
        self._pending: dict[int, PendingRead] = {}

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """The bytes of each range; see `Store`.

        Raises:
            FileNotFoundError, PermissionError, OSError: at once, when retrying would not help.
            TimeoutError: one of them was not read within the deadline. CancelledError: `cancel` was called.
        """
        return self._run(self._read_all(ranges)) if ranges else []

    def cancel(self) -> None:
        """Cancel all reads; their callers get CancelledError."""
        with self._lock:  # `_run` registers each call under the same lock
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def pending(self) -> list[str]:
        """The byte ranges being read: URL, seconds, tries, last error."""
        now = time.monotonic()
        return [
            f"{self._name(read.wanted)}: {now - read.since:.1f} s, try {read.tries}"
            + (f", last: {read.last}" if read.last else "")
            for read in sorted(self._pending.values(), key=lambda read: read.since)
        ]

    def _name(self, wanted: ByteRange) -> str:
        """A byte range as messages show it."""
        return join_url(self.url, str(wanted))

    def close(self) -> None:
        """Cancel reads and close connections; a later read opens new ones."""
        with self._lock:
            calls = list(self._calls)
            if self._process != os.getpid():
                return  # the parent's clients are kept, see `_inherited`
            client, self._client, self._process = self._client, None, 0
        for call in calls:
            call.cancel()
        if client is not None:
            client.close()

    def _run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine in fsspec's loop, and wait."""
        with self._lock:
            if self._process != os.getpid():
                self._connect()
            call = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._calls.add(call)
        try:
            return call.result()
        except BaseException:
            call.cancel()  # where this thread was interrupted
            raise
        finally:
            self._calls.discard(call)

    def _connect(self) -> None:
        """Make the clients of this process."""
        if self._process:
            _inherited.append((self._client, self._filesystem))
        self._filesystem, self._root = fsspec.url_to_fs(self._url, **self.options)
        self._loop = self._filesystem.loop if self._filesystem.async_impl else get_loop()
        self._client, self._pending, self._calls = None, {}, set()
        self._limiter = rate_limiter(self.settings.connections, self.settings.requests_per_second)
        self._addresses: dict[str, Address] = {}
        self._latencies = defaultdict[int, Latencies](lambda: Latencies(self.settings.hedge_percentile))
        self._process = os.getpid()

    async def _read_all(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        tasks = [asyncio.ensure_future(self._read(each)) for each in ranges]
        try:
            return await asyncio.gather(*tasks)
        finally:
            end(tasks)

    async def _read(self, wanted: ByteRange) -> bytes:
        read = PendingRead(wanted)
        self._pending[id(read)] = read
        try:
            return await self._retry(read)
        except StoreError as error:
            raise error.with_url(join_url(self.url, wanted.name)) from None
        finally:
            del self._pending[id(read)]

    async def _retry(self, read: PendingRead) -> bytes:
        """A byte range, retried within the deadline, which excludes the time spent in the rate limiter."""
        left = self.settings.deadline
        while True:
            async with self._limiter:
                read.tries += 1
                began = time.monotonic()
                try:
                    # The first try has its own limit; another timer costs a tenth of a request.
                    async with asyncio.timeout(left) if read.tries > 1 else contextlib.nullcontext():
                        return await self._try(read.wanted)
                except TimeoutError:
                    raise self._too_late(read) from None
                except StoreError as error:
                    failure = error
            left -= time.monotonic() - began
            pause = POLICY.pause(failure, read.tries)
            if not failure.transient:
                raise failure
            read.last = str(failure)
            if pause >= left:
                raise self._too_late(read)
            self._note_retry(read)
            await asyncio.sleep(pause)
            left -= pause

    def _note_retry(self, read: PendingRead) -> None:
        self.counters["retries"] += 1
        now = time.monotonic()
        if now - max(read.since, self._warned) > WARN_SECONDS:
            self._warned = now
            log.warning(
                "%s: %d tries in %.0f s, the last: %s; retrying until remote.deadline=%g s",
                self._name(read.wanted), read.tries, now - read.since, read.last, self.settings.deadline,
            )  # fmt: skip

    def _too_late(self, read: PendingRead) -> TimeoutError:
        return TimeoutError(
            f"{self._name(read.wanted)} was not read within remote.deadline={self.settings.deadline:g} s "
            f"({read.tries} tries); the last: {read.last}"
        )

    async def _try(self, wanted: ByteRange) -> bytes:
        """One try, or two if the credentials of the first may have expired."""
        address = await self._address(wanted.name)
        try:
            return await self._hedged(wanted, address)
        except StoreError as error:
            if address is None or error.kind is not PermissionError:
                raise
        self._addresses.pop(wanted.name, None)  # another read may have done so
        return await self._hedged(wanted, await self._address(wanted.name))

    async def _hedged(self, wanted: ByteRange, address: Address | None) -> bytes:
        """A byte range, requested a second time when the response takes longer than nearly all others."""
        latencies, began = self._latencies[size_class(wanted)], time.monotonic()
        first = self._request(wanted, address)
        second: list[asyncio.Task[bytes]] = []
        timer = None  # asyncio.wait costs a tenth of a request
        if latencies.hedge_after is not None:
            timer = first.get_loop().call_later(latencies.hedge_after, self._hedge, wanted, address, first, second)
        try:
            data = await first
            if not first.replaced:
                latencies.note(time.monotonic() - began)
        except StoreError as error:
            if not (second and error.transient):
                raise
            data = await second[0]
            self.counters["hedges_won"] += 1
        finally:
            if timer is not None:
                timer.cancel()
            end(second)
        self.counters["bytes_fetched"] += len(data)
        return data

    def _hedge(
        self, wanted: ByteRange, address: Address | None, first: Response, second: list[asyncio.Task[bytes]]
    ) -> None:
        """Send the second request, unless the store is slow as a whole; its result replaces the first one's."""
        few = self.counters["hedges"] < FREE_HEDGES + MAX_HEDGED_SHARE * self.counters["requests"]
        if first.done() or not (few and self._limiter.is_free()):
            return
        self.counters["hedges"] += 1
        second.append(asyncio.ensure_future(self._request_again(wanted, address)))
        second[0].add_done_callback(lambda task: self._replace(first, task))

    async def _request_again(self, wanted: ByteRange, address: Address | None) -> bytes:
        async with self._limiter:
            began = time.monotonic()
            data = await self._request(wanted, address)
            self._latencies[size_class(wanted)].note(time.monotonic() - began)
            return data

    def _replace(self, first: Response, task: asyncio.Task[bytes]) -> None:
        if not (first.done() or task.cancelled() or task.exception()):
            self.counters["hedges_won"] += 1
            first.replace(task.result())

    def _request(self, wanted: ByteRange, address: Address | None) -> Response:
        """Send one request."""
        self.counters["requests"] += 1
        if address is None:
            return TaskResponse(asyncio.ensure_future(self._bounded(self._read_by_fsspec(wanted))))
        client = self._client
        if client is None:
            if self._process != os.getpid():
                raise asyncio.CancelledError  # closed meanwhile
            loop = asyncio.get_running_loop()
            client = self._client = HttpClient(loop, self.settings.connections, self._try_seconds)
        return client.get(address, wanted.start, wanted.end)

    async def _read_by_fsspec(self, wanted: ByteRange) -> bytes:
        path = join_url(self._root, wanted.name)
        limits = {} if wanted.end is None else {"start": wanted.start, "end": wanted.end}
        if self._filesystem.async_impl:
            return await self._filesystem._cat_file(path, **limits)
        return await asyncio.to_thread(self._filesystem.cat_file, path, **limits)

    async def _bounded(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Await a call of an fsspec file system for at most the time of a try. Raises StoreError."""
        try:
            async with asyncio.timeout(self._try_seconds):
                return await work
        except TimeoutError:
            raise StoreError(
                f"no response within {self._try_seconds:g} s (remote.try_seconds)", transient=True
            ) from None
        except Exception as error:
            raise describe_error(error) from None

    async def _address(self, name: str) -> Address | None:
        """The HTTP address of an object; None where only fsspec can read it."""
        known = self._addresses.get(name)
        if known is not None and time.monotonic() < known.until:
            return known
        found = await self._bounded(sign(self._filesystem, join_url(self._root, name)))
        if found is not None:
            self._addresses[name] = found
        return found


class Latencies:
    """Durations of the last requests of a size class, and the delay after which one is hedged.

    hedge_after: None while too few have been seen.
    """

    def __init__(self, percentile: float) -> None:
        self.hedge_after: float | None = None
        self._percentile, self._last, self._noted = percentile, deque[float](maxlen=LATENCIES), 0

    def note(self, seconds: float) -> None:
        """Add a request."""
        self._last.append(seconds)
        self._noted += 1
        if self._percentile and self._noted >= MIN_LATENCIES and self._noted % UPDATE_EVERY == 0:
            found = sorted(self._last)[int(self._percentile * (len(self._last) - 1))]
            self.hedge_after = max(MIN_HEDGE_SECONDS, found)


class TaskResponse(Response):
    """The response of a task."""

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
    """Cancel running tasks, and mark the errors of the others as seen."""
    for task in tasks:
        if task.done() and not task.cancelled():
            task.exception()
        task.cancel()


def size_class(wanted: ByteRange) -> int:
    """Size class: requests of one class differ in size by less than a factor of 8."""
    return -1 if wanted.end is None else wanted.size.bit_length() // 3
