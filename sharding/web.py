"""Photos and clips from web servers: one thread of libcurl for each process, with bounded connections and retries."""

from __future__ import annotations

import atexit
import functools
import heapq
import itertools
import os
import re
import select
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import BinaryIO

import pycurl
from yarl import URL

from sharding.curl import error_of, host_of, new_handle
from sharding.errors import UserError
from sharding.remote import ATTEMPTS, is_transient, pause_after

LONGEST_WAIT = 1.0  # seconds that the thread sleeps while something is under way
STRANGE = re.compile(r"[^\x21-\x7e]")  # what an address must have quoted


@dataclass(frozen=True)
class Fetching:
    """How media are fetched over a network; it changes no byte of the result."""

    connections: int = 16  # at once, of each worker process
    per_host: int = 8  # of these to one host
    attempts: int = ATTEMPTS
    timeout: float = 30.0  # seconds without a byte

    def check(self) -> None:
        """Raise ValueError, with the remedy, for settings that cannot work."""
        if min(self.connections, self.per_host, self.attempts) < 1 or self.timeout <= 0:
            raise UserError("--connections, --per-host and --attempts must be at least 1, --timeout above 0")


@dataclass
class Transfer:
    """One address on its way into `file`; `future` gets that file, at its start, or the error."""

    url: str
    file: BinaryIO
    future: Future[BinaryIO] = field(default_factory=Future)
    attempt: int = 1
    fault: Exception | None = None  # why the file cannot be written to

    @functools.cached_property
    def host(self) -> str:
        """Host and port."""
        return host_of(self.url)

    def write(self, data: bytes) -> int | None:
        """Take in the next bytes; called by libcurl."""
        try:
            self.file.write(data)
            return None
        except Exception as error:
            self.fault = error
            return 0  # which ends the transfer

    def error(self, curl: pycurl.Curl, code: int, message: str) -> Exception | None:
        """What went wrong, when libcurl ended with `code`."""
        if self.fault is not None:
            return self.fault
        return error_of(curl, code, message, self.url)


class WebClient:
    """Fetches addresses side by side in a thread of its own; connections are kept and used again."""

    def __init__(self, fetching: Fetching) -> None:
        self.fetching = fetching
        self.multi = pycurl.CurlMulti()
        self.new: deque[Transfer] = deque()
        self.later: list[tuple[float, int, Transfer]] = []  # (when, a number that tells equals apart, transfer)
        self.waiting: deque[Transfer] = deque()  # for a connection
        self.running: dict[pycurl.Curl, Transfer] = {}
        self.to_host: Counter[str] = Counter()
        self.idle: list[pycurl.Curl] = []
        self.numbers = itertools.count()
        self.asleep = self.closing = False
        self.ear, self.bell = os.pipe()
        self.thread = threading.Thread(target=self.run, name="web", daemon=True)
        self.thread.start()
        atexit.register(self.close)

    def fetch(self, url: str, file: BinaryIO) -> Future[BinaryIO]:
        """Begin to fetch an address into an open, empty file; the future gives that file, at its start.

        The future raises FileNotFoundError, WebError, or what writing to the file raised. Cancelling it ends the
        attempts.
        """
        if not self.thread.is_alive():
            raise RuntimeError("the thread that fetches from web servers has ended")
        transfer = Transfer(str(URL(url)) if STRANGE.search(url) else url, file)
        self.new.append(transfer)
        self.wake()
        return transfer.future

    def wake(self) -> None:
        """Let the thread look at what is new."""
        if self.asleep:
            self.asleep = False
            os.write(self.bell, b"!")

    def close(self) -> None:
        """End the thread with whatever is under way."""
        if self.closing:
            return
        self.closing = self.asleep = True
        self.wake()
        self.thread.join(timeout=5)
        if not self.thread.is_alive():
            os.close(self.ear)
            os.close(self.bell)
        atexit.unregister(self.close)

    def run(self) -> None:
        """The thread."""
        try:
            while not self.closing:
                self.begin()
                self.multi.perform()
                if not self.finish():
                    self.sleep()
        finally:  # nobody is to wait for what will not come
            for transfer in [*self.new, *self.waiting, *self.running.values(), *(late[2] for late in self.later)]:
                transfer.future.cancel()

    def finish(self) -> bool:
        """Deal with the transfers that libcurl is done with; whether there were any."""
        ended = False
        left = 1
        while left:
            left, good, bad = self.multi.info_read()
            for curl, code, message in [*((curl, pycurl.E_OK, "") for curl in good), *bad]:
                self.end(curl, code, message)
                ended = True
        return ended

    def begin(self) -> None:
        """Begin transfers as far as connections allow."""
        while self.new:
            self.waiting.append(self.new.popleft())
        while self.later and self.later[0][0] <= time.monotonic():
            self.waiting.append(heapq.heappop(self.later)[2])
        for _ in range(len(self.waiting)):
            if len(self.running) >= self.fetching.connections:
                return
            transfer = self.waiting.popleft()
            if transfer.future.cancelled():
                continue
            if self.to_host[transfer.host] >= self.fetching.per_host:
                self.waiting.append(transfer)
                continue
            self.to_host[transfer.host] += 1
            curl = self.idle.pop() if self.idle else handle_for_media(self.fetching.timeout)
            self.running[curl] = transfer
            curl.setopt(pycurl.URL, transfer.url)
            curl.setopt(pycurl.WRITEFUNCTION, transfer.write)
            self.multi.add_handle(curl)

    def end(self, curl: pycurl.Curl, code: int, message: str) -> None:
        """Hand over a transfer's result, or try again."""
        transfer = self.running.pop(curl)
        self.multi.remove_handle(curl)
        self.to_host[transfer.host] -= 1
        if not self.to_host[transfer.host]:
            del self.to_host[transfer.host]
        error = transfer.error(curl, code, message)
        self.idle.append(curl)
        transfer.file.seek(0)
        passing = error is not None and transfer.fault is None and is_transient(error)
        if passing and transfer.attempt < self.fetching.attempts:
            transfer.file.truncate()
            due = time.monotonic() + pause_after(error, transfer.attempt)
            transfer.attempt += 1
            heapq.heappush(self.later, (due, next(self.numbers), transfer))
        elif transfer.future.set_running_or_notify_cancel():
            if error is None:
                transfer.future.set_result(transfer.file)
            else:
                transfer.future.set_exception(error)

    def sleep(self) -> None:
        """Wait until bytes come, something new is asked for, or a pause is over."""
        seconds = LONGEST_WAIT
        if self.running and (milliseconds := self.multi.timeout()) >= 0:
            seconds = min(seconds, milliseconds / 1000)
        if self.later:
            seconds = min(seconds, max(0.0, self.later[0][0] - time.monotonic()))
        reading, writing, failing = self.multi.fdset()
        self.asleep = True
        if self.new or self.closing:
            self.asleep = False
            return
        heard = select.select([self.ear, *reading], writing, failing, seconds)[0]
        self.asleep = False
        if self.ear in heard:
            os.read(self.ear, 4096)


def handle_for_media(timeout: float) -> pycurl.Curl:
    """A handle that takes any address of an annotation file; proxies are those of the environment."""
    curl = new_handle(timeout)
    options = {
        pycurl.ACCEPT_ENCODING: "",  # whatever libcurl can unpack
        pycurl.NETRC: pycurl.NETRC_OPTIONAL,
        pycurl.LOW_SPEED_LIMIT: 1,  # bytes a second, over
        pycurl.LOW_SPEED_TIME: max(1, round(timeout)),  # seconds
    }
    for name, value in options.items():
        curl.setopt(name, value)
    return curl


@functools.lru_cache(maxsize=1)
def web_client(fetching: Fetching) -> WebClient:
    """This process' client, shared by its shards."""
    return WebClient(fetching)
