"""Bytes of objects in a remote folder: many requests at once, tried again, hedged, and within a deadline."""

from __future__ import annotations

import asyncio
import logging
import math
import netrc
import os
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.request import getproxies, proxy_bypass

import aiohttp
import fsspec
import tenacity
from fsspec.asyn import get_loop
from fsspec.implementations.local import LocalFileSystem
from yarl import URL

from loaders.config import RemoteReads
from loaders.failures import GoneError, TransientError, explain, failure_of_status, public_url
from loaders.gate import gate_of_process
from sharding.schema import join_url

log = logging.getLogger("loaders")

SIGNED_FOR = 3600  # seconds that a signed address is good for; it is made anew after half of them
LATENCIES = 256  # last requests of a size class from which the percentile is taken
ENOUGH_LATENCIES = 20
SILENCE = 5.0  # seconds without a part after which the log hears of its tries, and not more often
LEAST_PATIENCE = 0.05  # seconds before a second request, however fast the store
HEDGED_SHARE, HEDGED_FREE = 0.1, 16  # of the requests at most: a store slow as a whole is not asked twice as much

# Clients that a fork brought from the parent: collected as garbage, they would end the parent's connections.
INHERITED: list[tuple[Any, ...]] = []

Result = TypeVar("Result")


@dataclass(frozen=True)
class Part:
    """Bytes [start, end) of an object of the folder; all of it where there is no end."""

    name: str
    start: int = 0
    end: int | None = None

    def __str__(self) -> str:
        return "" if self.end is None else f" bytes {self.start}-{self.end - 1}"


@dataclass
class Waiting:
    """A part that is being read: since when, how often it was tried, and what went wrong last."""

    part: Part
    since: float = field(default_factory=time.monotonic)
    tries: int = 0
    last: str = ""


class Remote:
    """Reads parts of the objects under a URL; safe to use from several threads, and in a child after a fork.

    S3, GCS and HTTP are read by one HTTP client, with addresses that fsspec's file systems sign: their own reading
    costs ten times the CPU time a request and hides Retry-After. Everything else is read through fsspec itself.

    counters: requests (those sent, hedges and repetitions too), retries, hedges, hedges_won, bytes_fetched.
    """

    def __init__(self, url: str, options: dict[str, Any], settings: RemoteReads) -> None:
        self.url, self._url, self._options, self.settings = public_url(url), url, options, settings
        self.counters: Counter[str] = Counter()
        self._told = -math.inf  # when the log heard last of a part that does not come
        self._process = 0
        self._filesystem: Any = None
        self._lock = threading.Lock()
        self._session: aiohttp.ClientSession | None = None
        self._calls: set[Future[Any]] = set()
        self._waiting: dict[int, Waiting] = {}

    def fetch(self, parts: Sequence[Part]) -> list[bytes]:
        """The parts' bytes, read at the same time; fewer where an object ends before.

        Raises:
            FileNotFoundError, PermissionError, OSError: at once, when no repetition would help.
            TimeoutError: one of them was not read within the deadline. CancelledError: `cancel` was called.
        """
        return self._run(self._all(parts)) if parts else []

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
            f"{join_url(self.url, item.part.name)}{item.part}: {now - item.since:.1f} s, try {item.tries}"
            + (f", last: {item.last}" if item.last else "")
            for item in sorted(self._waiting.values(), key=lambda item: item.since)
        ]

    def close(self) -> None:
        """End reads and connections."""
        self.cancel()
        session, self._session = self._session, None
        if session is not None and self._process == os.getpid():
            self._process = 0
            asyncio.run_coroutine_threadsafe(session.close(), self._loop).result(10)

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
            INHERITED.append((self._session, self._filesystem))
        self._filesystem, self._root = fsspec.url_to_fs(self._url, **self._options)
        self._loop = self._filesystem.loop if self._filesystem.async_impl else get_loop()
        self._session, self._waiting, self._calls = None, {}, set()
        self._gate = gate_of_process(self.settings.connections, self.settings.requests_per_second)
        self._signed: dict[str, tuple[float, URL, dict[str, str]]] = {}
        self._proxies: dict[str, dict[str, Any]] = {}  # kept: aiohttp looks for them at every request, in a thread
        self._latencies: dict[int, deque[float]] = {}
        self._process = os.getpid()

    async def _all(self, parts: Sequence[Part]) -> list[bytes]:
        tasks = [asyncio.ensure_future(self._patiently(part)) for part in parts]
        try:
            return await asyncio.gather(*tasks)
        finally:
            end(tasks)

    async def _patiently(self, part: Part) -> bytes:
        """A part, tried again as long as that may help and the deadline allows."""
        waiting = Waiting(part)
        self._waiting[id(waiting)] = waiting
        try:
            async with asyncio.timeout(self.settings.deadline) as limit:
                async for attempt in tenacity.AsyncRetrying(
                    retry=tenacity.retry_if_exception_type(TransientError),
                    wait=wait_as_told,
                    stop=lambda state: state.upcoming_sleep >= seconds_to(limit),
                    before_sleep=lambda state: self._note_retry(waiting, state),
                    reraise=True,
                ):
                    with attempt:
                        left = seconds_to(limit)
                        limit.reschedule(None)  # our own bounds are not the store's fault
                        async with self._gate:
                            limit.reschedule(asyncio.get_running_loop().time() + left)
                            waiting.tries += 1
                            return await self._hedged(part)
        except TransientError as error:
            raise self._too_late(waiting, str(error)) from None
        except TimeoutError:
            raise self._too_late(waiting, waiting.last or "no answer") from None
        except GoneError as error:
            raise error.told_of(join_url(self.url, part.name)) from None
        finally:
            del self._waiting[id(waiting)]
        raise AssertionError("tenacity ends with a result or an error")

    def _note_retry(self, waiting: Waiting, state: tenacity.RetryCallState) -> None:
        self.counters["retries"] += 1
        assert state.outcome is not None
        waiting.last = str(state.outcome.exception())
        now = time.monotonic()
        if now - max(waiting.since, self._told) > SILENCE:
            self._told = now
            log.warning(
                "%s%s: %d tries in %.0f s, the last: %s; tried again until remote.deadline=%g s",
                join_url(self.url, waiting.part.name), waiting.part, waiting.tries, now - waiting.since,
                waiting.last, self.settings.deadline,
            )  # fmt: skip

    def _too_late(self, waiting: Waiting, reason: str) -> TimeoutError:
        return TimeoutError(
            f"{join_url(self.url, waiting.part.name)}{waiting.part} was not read within "
            f"remote.deadline={self.settings.deadline:g} s ({waiting.tries} tries); the last: {reason}"
        )

    async def _hedged(self, part: Part) -> bytes:
        """A part, asked for a second time when the answer takes longer than almost all others did."""
        tasks = [asyncio.ensure_future(self._once(part))]
        try:
            patience = self._patience(part)
            if patience is not None:
                await asyncio.wait(tasks, timeout=patience)
                if tasks[0].done() and tasks[0].exception() is None:
                    return tasks[0].result()
                if not tasks[0].done() and self._may_hedge():
                    self.counters["hedges"] += 1
                    tasks.append(asyncio.ensure_future(self._once_more(part)))
            return await self._first_good(tasks)
        finally:
            end(tasks)

    def _may_hedge(self) -> bool:
        few = self.counters["hedges"] < HEDGED_FREE + HEDGED_SHARE * self.counters["requests"]
        return few and self._gate.is_free()

    async def _once_more(self, part: Part) -> bytes:
        async with self._gate:
            return await self._once(part)

    async def _first_good(self, tasks: list[asyncio.Task[bytes]]) -> bytes:
        """The first result; an error when all have failed, or one for good."""
        running = set(tasks)
        while True:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                error = task.exception()
                if error is None:
                    self.counters["hedges_won"] += task is not tasks[0]
                    return task.result()
                if not running or not isinstance(error, TransientError):
                    raise error

    def _patience(self, part: Part) -> float | None:
        """Seconds after which a request of this size is a straggler; None while too few have been seen."""
        known = self._latencies.get(size_class(part), ())
        if not self.settings.hedge_percentile or len(known) < ENOUGH_LATENCIES:
            return None
        return max(LEAST_PATIENCE, sorted(known)[int(self.settings.hedge_percentile * (len(known) - 1))])

    async def _once(self, part: Part) -> bytes:
        """One request. Raises TransientError or GoneError."""
        self.counters["requests"] += 1
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.settings.try_seconds):
                data = await self._ask(part)
        except (TransientError, GoneError):
            raise
        except TimeoutError:
            raise TransientError(f"no answer within remote.try_seconds={self.settings.try_seconds:g}") from None
        except Exception as error:
            raise explain(error) from None
        self._latencies.setdefault(size_class(part), deque(maxlen=LATENCIES)).append(time.monotonic() - began)
        self.counters["bytes_fetched"] += len(data)
        return data

    async def _ask(self, part: Part) -> bytes:
        signed = await self._address(part.name)
        if signed is not None:
            try:
                return await self._ask_http(part, *signed)
            except PermissionError:  # the signature may have grown old with the credentials behind it
                self._signed.pop(part.name, None)  # another part may have done so
                signed = await self._address(part.name)
                assert signed is not None
                return await self._ask_http(part, *signed)
        path = join_url(self._root, part.name)
        limits = {} if part.end is None else {"start": part.start, "end": part.end}
        if self._filesystem.async_impl:
            return await self._filesystem._cat_file(path, **limits)
        return await asyncio.to_thread(self._filesystem.cat_file, path, **limits)

    async def _ask_http(self, part: Part, address: URL, headers: dict[str, str]) -> bytes:
        if part.end is not None:
            headers = {**headers, "Range": f"bytes={part.start}-{part.end - 1}"}
        async with self._client().get(address, headers=headers, **self._proxies.get(address.scheme, {})) as answer:
            if answer.status == 416:
                return b""  # the object ends before: the reader's checksums say what is missing
            if answer.status >= 400:
                raise failure_of_status(answer.status, answer.headers)
            if part.end is not None and answer.status != 206:
                raise GoneError(f"the server does not answer byte ranges (status {answer.status})")
            return await answer.read()

    async def _address(self, name: str) -> tuple[URL, dict[str, str]] | None:
        """Where to ask for an object over HTTP, and what to say; None where only fsspec knows."""
        known = self._signed.get(name)
        if known is not None and time.monotonic() < known[0]:
            return known[1], known[2]
        found = await sign(self._filesystem, join_url(self._root, name))
        if found is None:
            return None
        address, headers, seconds = found
        self._proxies = proxies_to(address.host)
        self._signed[name] = time.monotonic() + seconds, address, headers
        return address, headers

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            bundle = os.environ.get("AWS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
            secure: ssl.SSLContext | bool = ssl.create_default_context(cafile=bundle) if bundle else True
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self.settings.connections, ssl=secure),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=min(10.0, self.settings.try_seconds)),
                auto_decompress=False,
                headers={"Accept-Encoding": "identity"},
            )
        return self._session


def seconds_to(limit: asyncio.Timeout) -> float:
    """Seconds until a time limit."""
    when = limit.when()
    return math.inf if when is None else when - asyncio.get_running_loop().time()


def end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel what still runs; the errors of the others are known."""
    for task in tasks:
        if task.done() and not task.cancelled():
            task.exception()
        task.cancel()


async def sign(filesystem: Any, path: str) -> tuple[URL, dict[str, str], float] | None:
    """An address that needs nothing more, headers to send, and for how many seconds they are good."""
    kind = filesystem.protocol if isinstance(filesystem.protocol, str) else filesystem.protocol[0]
    if kind == "s3" and not (filesystem.req_kw or filesystem.s3_additional_kwargs):
        address = await filesystem._url(path, expires=SIGNED_FOR)
        return URL(address, encoded=True), {}, SIGNED_FOR / 2
    if kind in ("gs", "gcs") and not filesystem.requester_pays:
        headers: dict[str, str] = {}
        await asyncio.to_thread(filesystem.credentials.apply, headers)  # may ask for a new token
        return URL(filesystem.url(path), encoded=True), headers, 60.0
    if kind in ("http", "https") and not filesystem.kwargs:
        address = filesystem.encode_url(path)
        return address, login_of(address.host), SIGNED_FOR
    return None


def proxies_to(host: str | None) -> dict[str, dict[str, Any]]:
    """The environment's proxies for a host by the address' scheme, as aiohttp takes them."""
    if host is None or proxy_bypass(host):
        return {}
    proxies = {scheme: URL(proxy) for scheme, proxy in getproxies().items() if "://" in proxy}
    return {
        scheme: {"proxy": proxy.with_user(None), "proxy_auth": aiohttp.BasicAuth.from_url(proxy)}
        for scheme, proxy in proxies.items()
    }


def login_of(host: str | None) -> dict[str, str]:
    """The header with a host's user and password of ~/.netrc (or the file that NETRC names); empty without them."""
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host or "")
    except (OSError, netrc.NetrcParseError):
        return {}
    if found is None:
        return {}
    return {"Authorization": aiohttp.BasicAuth(found[0], found[2] or "").encode()}


def is_local(url: str, options: dict[str, Any]) -> bool:
    """Whether a URL is a folder of this machine."""
    return isinstance(fsspec.url_to_fs(url, **options)[0], LocalFileSystem)


def size_class(part: Part) -> int:
    """Requests of one class take about as long: their sizes differ by less than 8."""
    return -1 if part.end is None else (part.end - part.start).bit_length() // 3


def wait_as_told(state: tenacity.RetryCallState) -> float:
    """Seconds before the next try: what the server said, or twice as long each time, at random."""
    error = state.outcome.exception() if state.outcome is not None else None
    told = error.retry_after if isinstance(error, TransientError) else 0.0
    return told + BACKOFF(state)


BACKOFF = tenacity.wait_random_exponential(multiplier=0.1, max=20)
