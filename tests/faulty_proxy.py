"""A proxy between an HTTP client and a server that answers some requests as a bad day would: errors, delays, cuts."""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import urlsplit

KINDS = ("error", "throttle", "slow", "cut", "corrupt")
CHUNK = 2**16


@dataclass(frozen=True)
class Faults:
    """What the proxy does to the requests that go through it.

    Shares are of the requests a fault can fall on, and are kept to the request: of n of them, at least int(n * share)
    meet it, whatever the requests are and however fast they come. The seed decides with which request each kind begins.
    """

    error: float = 0.0  # answered 503 in place of the server
    throttle: float = 0.0  # answered 429 with Retry-After
    slow: float = 0.0  # the body takes slow_seconds
    cut: float = 0.0  # the connection ends in the middle of the body
    corrupt: float = 0.0  # a byte of the body is another one
    retry_after: int = 1  # seconds
    slow_seconds: float = 1.0
    latency: float = 0.0  # seconds before every answer
    only: str = ""  # faults fall on requests whose path matches this pattern (not: latency, permanent)
    corrupt_only: str = r"\.tar|\.parquet"  # and corruption on these: their readers can notice
    permanent: str = ""  # requests whose path matches this are always answered permanent_status
    permanent_status: int = 403
    seed: int = 0

    @classmethod
    def everywhere(cls, share: float, **settings: float) -> Faults:
        """All kinds of faults together on a share of the requests."""
        return cls(**dict.fromkeys(KINDS, share / len(KINDS)), **settings)  # type: ignore[arg-type]


class Dealer:
    """Deals faults to requests in their shares: each kind gathers its share a request, and is due at a whole one."""

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
    """One request: when it came, what it was, what was done to it ("" for nothing)."""

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
    port: int = 0

    def __post_init__(self) -> None:
        self._dealer = Dealer(self.faults)
        self._connections: set[asyncio.Task | None] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-proxy", daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=512), self._loop
        ).result()
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def endpoint(self) -> str:
        """Where clients are to go."""
        return f"http://127.0.0.1:{self.port}"

    def counts(self) -> Counter[str]:
        """Requests of each fault; those that went well are under ""."""
        return Counter(seen.fault for seen in self.log)

    def close(self) -> None:
        """End it, with the connections that are open."""

        async def end() -> None:
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client's connection: requests one after another, until either side ends it."""
        task = asyncio.current_task()
        self._connections.add(task)  # asyncio itself forgets tasks that nobody holds
        try:
            while await self._request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; whether the connection can take another one."""
        head = await reader.readuntil(b"\r\n\r\n")
        method, path, headers = parse_head(head)
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await read_body(reader, headers)
        fault = self._draw(method, path)
        self.log.append(Seen(time.monotonic(), method, path, headers.get("range", ""), fault))
        if self.faults.latency:
            await asyncio.sleep(self.faults.latency)
        if fault in ("permanent", "error", "throttle"):
            status = {"permanent": self.faults.permanent_status, "error": 503, "throttle": 429}[fault]
            extra = f"Retry-After: {self.faults.retry_after}\r\n" if fault == "throttle" else ""
            writer.write(f"HTTP/1.1 {status} Injected\r\n{extra}Content-Length: 0\r\n\r\n".encode())
            await writer.drain()
            return True
        host, port = self.upstream.split(":")
        up_reader, up_writer = await asyncio.open_connection(host, int(port))
        try:
            up_writer.write(replace_header(head, "Connection", "close") + body)
            await up_writer.drain()
            return await self._answer(method, fault, up_reader, writer)
        finally:
            up_writer.close()

    async def _answer(self, method: str, fault: str, up: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Pass the server's answer on, changed as the fault asks; whether the connection can take another request."""
        head = await up.readuntil(b"\r\n\r\n")
        while head.split(b" ", 2)[1] == b"100":
            head = await up.readuntil(b"\r\n\r\n")
        status, headers = int(head.split(b" ", 2)[1]), parse_head(head)[2]
        bare = method == "HEAD" or status in (204, 304)
        size = 0 if bare else int(headers["content-length"]) if "content-length" in headers else None
        writer.write(replace_header(head, "Connection", "close" if size is None else "keep-alive"))
        body = await up.readexactly(size) if size is not None else await up.read()
        if fault == "cut" and body:
            writer.write(body[: len(body) // 2])
            await writer.drain()
            return False
        if fault == "corrupt" and status in (200, 206) and body:
            place = random.Random(len(body)).randrange(len(body))
            body = body[:place] + bytes([body[place] ^ 0x55]) + body[place + 1 :]
        if fault == "slow" and body:
            for part in range(10):
                writer.write(body[len(body) * part // 10 : len(body) * (part + 1) // 10])
                await writer.drain()
                await asyncio.sleep(self.faults.slow_seconds / 10)
        else:
            writer.write(body)
            await writer.drain()
        return size is not None

    def _draw(self, method: str, path: str) -> str:
        if self._dealer.faults is not self.faults:
            self._dealer = Dealer(self.faults)
        return self._dealer.deal(method, urlsplit(path).path)


def parse_head(head: bytes) -> tuple[str, str, dict[str, str]]:
    """Method, path and headers (names in lower case) of a request; of an answer the headers."""
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ", 2)
    headers = dict(line.split(":", 1) for line in lines[1:] if ":" in line)
    return words[0], words[1], {name.lower(): value.strip() for name, value in headers.items()}


def replace_header(head: bytes, name: str, value: str) -> bytes:
    """The head of a request or an answer, with one header set."""
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(name.lower().encode() + b":")]
    return b"\r\n".join([*lines[:1], f"{name}: {value}".encode(), *lines[1:]])


async def read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    """A request's body as it is on the wire."""
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.readexactly(int(headers.get("content-length", 0)))
    body = b""
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        body += line + await reader.readexactly(size + 2)
        if size == 0:
            return body
