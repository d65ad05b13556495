"""Photos and clips from web servers: one thread of libcurl for each process, with bounded connections and retries."""

from __future__ import annotations

import atexit
import functools
import heapq
import itertools
import math
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

from runtime.errors import UserError
from runtime.flags import flag, positive
from storage.curl import Sockets, error_of, host_of, new_handle
from storage.policy import ATTEMPTS, RetryPolicy, StoreError, describe_error

LONGEST_WAIT = 1.0  # seconds that the thread sleeps while something is under way
SLOWEST = 1000  # bytes a second of a body, over `timeout` seconds
LARGEST_MB = {"image": 128, "video": 4096}  # images are fetched to memory, clips to disk
LONGEST = {"image": 600.0, "video": 7200.0}  # seconds that a transfer may take, with the usual timeout
USUAL_TIMEOUT = 30.0
STRANGE = re.compile(r"[^\x21-\x7e]")  # what an address must have quoted


@dataclass(frozen=True)
class Bounds:
    """What one transfer may take."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Fetching:
    """How media are fetched over a network; it changes no byte of the result."""

    connections: int = flag(16, "of each process at once (default: %(default)s)")
    per_host: int = flag(8, "of these to one web server (default: %(default)s)")
    attempts: int = flag(ATTEMPTS, "at a request that fails with a transient error (default: %(default)s)")
    timeout: float = flag(
        USUAL_TIMEOUT,  # seconds without a byte, or with fewer than SLOWEST a second
        "without a byte, or nearly, until a connection is given up (default: %(default)s)",
        metavar="SECONDS",
    )
    max_mb: int = flag(  # of one body, decompressed; 0: as LARGEST_MB says
        0,
        "larger bodies are failures (default: {image} for images, {video} for videos)".format(**LARGEST_MB),
        type=positive,
        metavar="MB",
    )

    def bounds(self, media_type: str) -> Bounds:
        """What one medium may take: a server's answer may have no end, or come at a byte a second."""
        largest = (self.max_mb or LARGEST_MB[media_type]) * 10**6
        return Bounds(largest, LONGEST[media_type] * max(1.0, self.timeout / USUAL_TIMEOUT))

    def check(self) -> None:
        """Raise ValueError, with the remedy, for settings that cannot work."""
        if self.max_mb < 0:
            raise UserError(f"--max-mb is {self.max_mb}, must be at least 1")
        if min(self.connections, self.per_host, self.attempts) < 1 or self.timeout <= 0:
            raise UserError("--connections, --per-host and --attempts must be at least 1, --timeout above 0")


@dataclass
class Transfer:
    """One address on its way into `file`; `future` gets that file, at its start, or the error."""

    url: str
    file: BinaryIO
    bounds: Bounds
    future: Future[BinaryIO] = field(default_factory=Future)
    attempt: int = 1
    size: int = 0  # bytes written
    fault: Exception | None = None  # why no more bytes are taken

    @functools.cached_property
    def host(self) -> str:
        """Host and port."""
        return host_of(self.url)

    def write(self, data: bytes) -> int | None:
        """Take in the next bytes; called by libcurl."""
        self.size += len(data)
        try:
            if self.size > self.bounds.bytes:
                raise self.too_large()
            self.file.write(data)
            return None
        except Exception as error:
            self.fault = error
            return 0  # which ends the transfer

    def too_large(self) -> StoreError:
        """The error for a body that has more bytes than it may have."""
        return StoreError(f"larger than {self.bounds.bytes / 1e6:,.0f} MB: raise --max-mb")

    def error(self, curl: pycurl.Curl, code: int, message: str) -> Exception | None:
        """What went wrong, when libcurl ended with `code`."""
        if curl.getinfo(pycurl.RESPONSE_CODE) < 400:
            if self.fault is not None:
                return self.fault
            if code == pycurl.E_FILESIZE_EXCEEDED:  # by the length that the server says
                return self.too_large()
            if code == pycurl.E_OPERATION_TIMEDOUT and curl.getinfo(pycurl.TOTAL_TIME) >= self.bounds.seconds:
                return StoreError(f"not complete after {self.bounds.seconds:g} seconds: raise --timeout")
        return error_of(curl, code, message, self.url)

    def restart(self) -> None:
        """Make ready for another attempt."""
        self.file.seek(0)
        self.file.truncate()
        self.size, self.fault = 0, None
        self.attempt += 1


class WebClient:
    """Fetches addresses side by side in a thread of its own; connections are kept and used again."""

    def __init__(self, fetching: Fetching) -> None:
        self.fetching = fetching
        self.multi = pycurl.CurlMulti()
        self.multi.setopt(pycurl.M_TIMERFUNCTION, self.set_timer)
        self.sockets = Sockets(self.multi)
        self.due: float | None = None  # when libcurl wants to be called
        self.new: deque[Transfer] = deque()
        self.later: list[tuple[float, int, Transfer]] = []  # (when, a number that tells equals apart, transfer)
        self.waiting: deque[Transfer] = deque()  # for a connection
        self.running: dict[pycurl.Curl, Transfer] = {}
        self.to_host: Counter[str] = Counter()
        self.idle: list[pycurl.Curl] = []
        self.numbers = itertools.count()
        self.asleep = self.closing = False
        self.wake_read, self.wake_write = os.pipe()
        self.sockets.epoll.register(self.wake_read, select.EPOLLIN)
        self.thread = threading.Thread(target=self.run, name="web", daemon=True)
        self.thread.start()
        atexit.register(self.close)

    def fetch(self, url: str, file: BinaryIO, bounds: Bounds) -> Future[BinaryIO]:
        """Begin to fetch an address into an open, empty file; the future gives that file, at its start.

        The future raises StoreError, or what writing to the file raised. Cancelling it ends the
        attempts.
        """
        if not self.thread.is_alive():
            raise RuntimeError("the thread that fetches from web servers has ended")
        transfer = Transfer(str(URL(url)) if STRANGE.search(url) else url, file, bounds)
        self.new.append(transfer)
        self.wake()
        return transfer.future

    def wake(self) -> None:
        """Let the thread look at what is new."""
        if self.asleep:
            self.asleep = False
            os.write(self.wake_write, b"!")

    def close(self) -> None:
        """End the thread with whatever is under way."""
        if self.closing:
            return
        self.closing = self.asleep = True
        self.wake()
        self.thread.join(timeout=5)
        if not self.thread.is_alive():
            os.close(self.wake_read)
            os.close(self.wake_write)
            self.sockets.epoll.close()
        atexit.unregister(self.close)

    def run(self) -> None:
        """The thread."""
        try:
            while not self.closing:
                self.begin()
                if self.due is not None and self.due <= time.monotonic():
                    self.due = None
                    self.multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
                if not self.finish():
                    self.sleep()
        finally:  # nobody is to wait for what will not come
            for transfer in [*self.new, *self.waiting, *self.running.values(), *(late[2] for late in self.later)]:
                transfer.future.cancel()

    def set_timer(self, milliseconds: int) -> None:
        """Called by libcurl: when it wants to be called."""
        self.due = None if milliseconds < 0 else time.monotonic() + milliseconds / 1000

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
            curl.setopt(pycurl.MAXFILESIZE_LARGE, transfer.bounds.bytes)
            curl.setopt(pycurl.TIMEOUT_MS, int(transfer.bounds.seconds * 1000))
            self.multi.add_handle(curl)

    def end(self, curl: pycurl.Curl, code: int, message: str) -> None:
        """Hand over a transfer's result, or try again."""
        transfer = self.running.pop(curl)
        self.multi.remove_handle(curl)
        self.to_host[transfer.host] -= 1
        if not self.to_host[transfer.host]:
            del self.to_host[transfer.host]
        error = transfer.error(curl, code, message)
        curl.setopt(pycurl.WRITEFUNCTION, len)  # an idle handle must not keep the body in memory
        self.idle.append(curl)
        pause = math.inf
        if error is not None and error is not transfer.fault:
            pause = RetryPolicy(self.fetching.attempts).pause(describe_error(error), transfer.attempt)
        if pause < math.inf:
            transfer.restart()
            heapq.heappush(self.later, (time.monotonic() + pause, next(self.numbers), transfer))
            return
        transfer.file.seek(0)
        if transfer.future.set_running_or_notify_cancel():
            if error is None:
                transfer.future.set_result(transfer.file)
            else:
                transfer.future.set_exception(error)

    def sleep(self) -> None:
        """Wait until bytes come, something new is asked for, or a pause is over."""
        seconds = LONGEST_WAIT
        if self.due is not None:
            seconds = min(seconds, max(0.0, self.due - time.monotonic()))
        if self.later:
            seconds = min(seconds, max(0.0, self.later[0][0] - time.monotonic()))
        self.asleep = True
        if self.new or self.closing:
            self.asleep = False
            return
        found = dict(self.sockets.epoll.poll(seconds))
        self.asleep = False
        if found.pop(self.wake_read, 0):
            os.read(self.wake_read, 4096)
        self.sockets.act(found.items())


def handle_for_media(timeout: float) -> pycurl.Curl:
    """A handle that takes any address of an annotation file; proxies are those of the environment."""
    curl = new_handle(timeout)
    options = {
        pycurl.ACCEPT_ENCODING: "",  # whatever libcurl can unpack
        pycurl.NETRC: pycurl.NETRC_OPTIONAL,
        pycurl.LOW_SPEED_LIMIT: SLOWEST,  # over
        pycurl.LOW_SPEED_TIME: max(1, round(timeout)),  # seconds
    }
    for name, value in options.items():
        curl.setopt(name, value)
    return curl


@functools.lru_cache(maxsize=1)
def web_client(fetching: Fetching) -> WebClient:
    """This process' client, shared by its shards."""
    return WebClient(fetching)
