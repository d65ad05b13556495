"""Photos and clips from web servers, fetched by libcurl with bounded connections and retries."""

from __future__ import annotations

import asyncio
import atexit
import functools
import itertools
import math
import re
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, BinaryIO
from weakref import WeakValueDictionary

import pycurl
from fsspec.asyn import get_loop
from yarl import URL

from storage.curl import AsyncCurl, error_of, host_of, new_handle
from storage.fetching import Bounds, Fetching
from storage.policy import RetryPolicy, StoreError, describe_error

SLOWEST = 1000  # bytes per second of a body, over `timeout` seconds
TO_QUOTE = re.compile(r"[^\x21-\x7e]")  # characters that a URL must quote


@dataclass
class Transfer:
    """One download into `file`."""

    url: str
    file: BinaryIO
    bounds: Bounds
    size: int = 0  # bytes written
    fault: Exception | None = None  # why the transfer was aborted here

    def write(self, data: bytes) -> int | None:
        """Write the next bytes; called by libcurl."""
        self.size += len(data)
        try:
            if self.size > self.bounds.bytes:
                raise self.too_large()
            self.file.write(data)
            return None
        except Exception as error:
            self.fault = error
            return 0  # ends the transfer

    def too_large(self) -> StoreError:
        """The error for a body above the limit."""
        return StoreError(f"larger than {self.bounds.bytes / 1e6:,.0f} MB: raise --max-mb")

    def error(self, curl: pycurl.Curl, code: int, message: str) -> Exception | None:
        """The error of a download that libcurl ended with `code`."""
        if curl.getinfo(pycurl.RESPONSE_CODE) < 400:
            if self.fault is not None:
                return self.fault
            if code == pycurl.E_FILESIZE_EXCEEDED:  # by the server's Content-Length
                return self.too_large()
            if code == pycurl.E_OPERATION_TIMEDOUT and curl.getinfo(pycurl.TOTAL_TIME) >= self.bounds.seconds:
                return StoreError(f"not complete after {self.bounds.seconds:g} seconds: raise --timeout")
        return error_of(curl, code, message, self.url)

    def restart(self) -> None:
        """Prepare another attempt."""
        self.file.seek(0)
        self.file.truncate()
        self.size, self.fault = 0, None


class WebClient:
    """Downloads URLs concurrently, in the event loop of fsspec; connections are reused."""

    def __init__(self, fetching: Fetching) -> None:
        self.fetching = fetching
        self._policy = RetryPolicy(fetching.attempts)
        self._loop = get_loop()
        self._curl: AsyncCurl | None = None
        self._connections = asyncio.Semaphore(fetching.connections)
        self._hosts: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # of hosts in use
        self._tasks: set[asyncio.Task[Any]] = set()
        atexit.register(self.close)

    def fetch(self, url: str, file: BinaryIO, bounds: Bounds) -> Future[BinaryIO]:
        """Start a download into an open, empty file; the future returns the file, positioned at its start.

        The future raises StoreError, or what writing to the file raised. Cancelling it ends the attempts.
        """
        if self._loop is not get_loop():
            raise RuntimeError("a download client does not work in a forked process")
        transfer = Transfer(str(URL(url)) if TO_QUOTE.search(url) else url, file, bounds)
        return asyncio.run_coroutine_threadsafe(self._fetch(transfer), self._loop)

    def close(self) -> None:
        """Cancel all transfers and close all connections; a later download opens new ones."""
        if self._loop is get_loop():  # not in a forked child
            wait([asyncio.run_coroutine_threadsafe(self._end_all(), self._loop)], timeout=5)
        atexit.unregister(self.close)

    async def _end_all(self) -> None:
        while self._tasks:  # also those that began meanwhile
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        if self._curl is not None:
            self._curl.close()
            self._curl = None

    async def _fetch(self, transfer: Transfer) -> BinaryIO:
        """All attempts at a transfer."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        host = self._hosts.setdefault(host_of(transfer.url), asyncio.Semaphore(self.fetching.per_host))
        for attempt in itertools.count(1):
            async with host, self._connections:
                error = await self._attempt(transfer)
            if error is None:
                break
            pause = math.inf if error is transfer.fault else self._policy.pause(describe_error(error), attempt)
            if pause == math.inf:
                raise error
            transfer.restart()
            await asyncio.sleep(pause)
        transfer.file.seek(0)
        return transfer.file

    async def _attempt(self, transfer: Transfer) -> Exception | None:
        """Make one attempt; returns its error."""
        if self._curl is None:
            self._curl = AsyncCurl(self._loop, lambda: handle_for_media(self.fetching.timeout))
        curls = self._curl
        curl = curls.handle()
        curl.setopt(pycurl.URL, transfer.url)
        curl.setopt(pycurl.WRITEFUNCTION, transfer.write)
        curl.setopt(pycurl.MAXFILESIZE_LARGE, transfer.bounds.bytes)
        curl.setopt(pycurl.TIMEOUT_MS, int(transfer.bounds.seconds * 1000))
        ended: asyncio.Future[tuple[int, str]] = self._loop.create_future()
        curls.start(curl, lambda *end: None if ended.done() else ended.set_result(end))
        try:
            return transfer.error(curl, *await ended)
        finally:
            curls.stop(curl)
            curl.setopt(pycurl.WRITEFUNCTION, len)  # an idle handle must not keep the body in memory


def handle_for_media(timeout: float) -> pycurl.Curl:
    """A handle that takes any address of an annotation file; proxies are those of the environment."""
    options = {
        pycurl.ACCEPT_ENCODING: "",  # all that libcurl can decode
        pycurl.NETRC: pycurl.NETRC_OPTIONAL,
        pycurl.LOW_SPEED_LIMIT: SLOWEST,  # over
        pycurl.LOW_SPEED_TIME: max(1, round(timeout)),  # seconds
    }
    return new_handle(timeout, options)


@functools.lru_cache(maxsize=1)
def web_client(fetching: Fetching) -> WebClient:
    """This process' client, shared by its shards."""
    return WebClient(fetching)
