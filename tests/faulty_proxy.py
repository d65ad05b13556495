"""A proxy between an HTTP client and a server that injects faults: errors, delays, cut and corrupt answers."""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

KINDS = ("error", "throttle", "slow", "cut", "corrupt")


@dataclass(frozen=True)
class Faults:
    """The faults that the proxy injects.

    A share counts the requests that a fault applies to, and is exact: of n requests at least int(n * share) get the
    fault, whatever their order and speed. The seed decides which request of each kind is the first.
    """

    error: float = 0.0  # answered 503 in place of the server
    throttle: float = 0.0  # answered 429 with Retry-After
    slow: float = 0.0  # the body takes slow_seconds
    cut: float = 0.0  # the connection ends in the middle of the body
    corrupt: float = 0.0  # a byte of the body is another one
    retry_after: int = 1  # seconds
    slow_seconds: float = 1.0
    latency: float = 0.0  # seconds before every answer
    only: str = ""  # pattern of the paths with faults, except latency and permanent
    corrupt_only: str = r"\.tar|\.parquet"  # and of those with corruption, which their readers detect
    permanent: str = ""  # requests whose path matches this are always answered permanent_status
    permanent_status: int = 403
    seed: int = 0

    @classmethod
    def everywhere(cls, share: float, **settings: float) -> Faults:
        """All kinds of faults together, on a share of the requests."""
        return cls(**dict.fromkeys(KINDS, share / len(KINDS)), **settings)  # type: ignore[arg-type]


class Dealer:
    """Assigns faults to requests: each kind adds its share per request and is due when the sum reaches 1."""

    def __init__(self, faults: Faults) -> None:
        rng = random.Random(faults.seed)
        self.faults, self._due = faults, {kind: rng.random() for kind in KINDS}

    def deal(self, method: str, place: str) -> str:
        """The fault of the next request, "" for none."""
        faults = self.faults
        if faults.permanent and re.search(faults.permanent, place):
            return "permanent"
        if not re.search(faults.only, place):
            return ""
        harmless = () if method == "GET" else ("slow", "cut", "corrupt")
        noticed = re.search(faults.corrupt_only, place)
        kinds = [kind for kind in KINDS if kind not in harmless and (noticed or kind != "corrupt")]
        for kind in kinds:
            self._due[kind] += getattr(faults, kind)
        latest = max(kinds, key=self._due.__getitem__)
        if self._due[latest] < 1:
            return ""
        self._due[latest] -= 1
        return latest


@dataclass
class Seen:
    """One request: its time, what it asked for, and the injected fault ("" for none)."""

    at: float
    method: str
    path: str
    range: str
    fault: str


@dataclass
class FaultyProxy:
    """Listens on 127.0.0.1:`port` in a thread of its own and passes requests on to `upstream` (host:port).

    log: every request so far; `counts()` sums it up. `faults` may be replaced at any time.
    """

    upstream: str
    faults: Faults = field(default_factory=Faults)
    log: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._dealer = Dealer(self.faults)
        self._running = ExitStack()
        self.port = self._running.enter_context(
            web_server(lambda: web.ServerRunner(web.Server(self._handle, auto_decompress=False), shutdown_timeout=0.1))
        )

    @property
    def endpoint(self) -> str:
        """The URL that clients use."""
        return f"http://127.0.0.1:{self.port}"

    def counts(self) -> Counter[str]:
        """Requests of each fault; those without are under ""."""
        return Counter(seen.fault for seen in self.log)

    def close(self) -> None:
        """End it, with the connections that are open."""
        self._running.close()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await request.content.read()
        if self._dealer.faults is not self.faults:
            self._dealer = Dealer(self.faults)
        fault = self._dealer.deal(request.method, urlsplit(request.raw_path).path)
        spans = request.headers.get("Range", "")
        self.log.append(Seen(time.monotonic(), request.method, request.raw_path, spans, fault))
        await asyncio.sleep(self.faults.latency)
        if status := {"permanent": self.faults.permanent_status, "error": 503, "throttle": 429}.get(fault):
            extra = {"Retry-After": str(self.faults.retry_after)} if fault == "throttle" else {}
            return web.Response(status=status, reason="Injected", headers=extra)
        async with (
            aiohttp.ClientSession(auto_decompress=False, connector=aiohttp.TCPConnector(force_close=True)) as session,
            session.request(
                request.method,
                URL(f"http://{self.upstream}{request.raw_path}", encoded=True),
                headers=without(request.headers, "Expect", "Transfer-Encoding", "Content-Length", "Connection"),
                skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent", "Content-Type"),
                data=body or None,
                allow_redirects=False,
            ) as found,
        ):
            headers = without(found.headers, "Transfer-Encoding", "Connection")
            answer = web.StreamResponse(status=found.status, reason=found.reason, headers=headers)
            return await self._answer(request, answer, fault, await found.read())

    async def _answer(
        self, request: web.BaseRequest, answer: web.StreamResponse, fault: str, body: bytes
    ) -> web.StreamResponse:
        """Send the server's answer, changed as the fault asks."""
        await answer.prepare(request)
        if fault == "corrupt" and answer.status in (200, 206) and body:
            place = random.Random(len(body)).randrange(len(body))
            body = body[:place] + bytes([body[place] ^ 0x55]) + body[place + 1 :]
        if fault == "cut" and body:
            await answer.write(body[: len(body) // 2])
            assert request.transport is not None
            request.transport.close()
            return answer
        parts = 10 if fault == "slow" else 1
        for part in range(parts if body else 0):
            await answer.write(body[len(body) * part // parts : len(body) * (part + 1) // parts])
            await asyncio.sleep(self.faults.slow_seconds / parts if fault == "slow" else 0)
        await answer.write_eof()
        return answer


def without(headers: Mapping[str, str], *names: str) -> CIMultiDict[str]:
    """The headers but those named."""
    kept = CIMultiDict(headers)
    for name in names:
        kept.popall(name, None)
    return kept


@contextmanager
def web_server(make_runner: Callable[[], web.BaseRunner]) -> Iterator[int]:
    """A server on 127.0.0.1 in a thread of its own; yields its port."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="web-server", daemon=True)
    thread.start()

    async def start() -> web.BaseRunner:
        runner = make_runner()
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=512).start()
        return runner

    async def end(runner: web.BaseRunner) -> None:
        await runner.cleanup()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield runner.addresses[0][1]
    finally:
        asyncio.run_coroutine_threadsafe(end(runner), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
