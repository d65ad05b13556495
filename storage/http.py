"""Byte ranges over HTTP in an asyncio loop, by libcurl, which takes a fifth of the CPU time of aiohttp."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from abc import ABC, abstractmethod
from urllib.parse import urlsplit

import pycurl

from storage.addresses import Address
from storage.curl import Sockets, error_of, new_handle
from storage.policy import StoreError, describe_error

CONNECT_SECONDS = 10.0  # at most, of a try
LARGEST_OBJECT = 2**30  # bytes, where a whole object is asked for: a description, an index


class Response(asyncio.Future[bytes], ABC):
    """The bytes of a request, or a StoreError; cancelling or replacing it ends the request."""

    replaced = False  # whether the bytes come from another request

    @abstractmethod
    def stop(self) -> None:
        """End the request, if it has not ended."""

    def cancel(self, msg: object = None) -> bool:
        """End the request."""
        self.stop()
        return super().cancel(msg)

    def replace(self, data: bytes) -> None:
        """End the request: another one brought the bytes."""
        self.stop()
        self.replaced = True
        self.set_result(data)


class Transfer(Response):
    """A request that libcurl handles."""

    def __init__(self, client: HttpClient, address: Address, size: int | None) -> None:
        super().__init__(loop=client.loop)
        self.client, self.address, self.size = client, address, size
        self.curl: pycurl.Curl | None = None  # while it is under way
        self.chunks: list[bytes] = []

    def stop(self) -> None:
        """Hang up."""
        if self.curl is not None:
            self.client.release(self)


class HttpClient:
    """Asks for byte ranges, as many at a time as it is told to; connections are kept. To be used in its loop alone.

    libcurl's sockets are watched by an epoll of their own, and that one by the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, connections: int, try_seconds: float) -> None:
        """connections: kept for further requests. try_seconds: after which a request is given up."""
        self.loop, self.try_seconds = loop, try_seconds
        self._bundle = os.environ.get("AWS_CA_BUNDLE")
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)
        self._multi.setopt(pycurl.M_MAXCONNECTS, connections)
        self._sockets = Sockets(self._multi)
        self._due: float | None = None  # when libcurl wants to be called
        self._timer: asyncio.TimerHandle | None = None  # not later than that
        self._idle: list[pycurl.Curl] = []
        self._running: dict[pycurl.Curl, Transfer] = {}
        loop.add_reader(self._sockets.epoll.fileno(), self._ready)

    def get(self, address: Address, start: int = 0, end: int | None = None) -> Response:
        """Ask for bytes [start, end), all where there is no end; fewer come where the object ends before.

        Raises StoreError where the address is none.
        """
        curl = self._idle.pop() if self._idle else self._new_handle()
        transfer = Transfer(self, address, None if end is None else end - start)
        try:
            curl.setopt(pycurl.URL, address.url)
            curl.setopt(pycurl.PROXY, address.proxy)
            curl.setopt(pycurl.HTTPHEADER, address.headers)
        except (ValueError, pycurl.error):  # characters that cannot stand there
            self._idle.append(curl)
            raise StoreError("no valid address") from None
        curl.setopt(pycurl.RANGE, None if end is None else f"{start}-{end - 1}")
        curl.setopt(pycurl.MAXFILESIZE_LARGE, transfer.size or LARGEST_OBJECT)  # a server may send more
        curl.setopt(pycurl.WRITEFUNCTION, transfer.chunks.append)
        self._running[curl], transfer.curl = transfer, curl
        self._multi.add_handle(curl)
        return transfer

    def release(self, transfer: Transfer) -> None:
        """End a transfer, if need be by closing its connection; the handle can be used again."""
        curl, transfer.curl = transfer.curl, None
        assert curl is not None
        del self._running[curl]
        self._multi.remove_handle(curl)
        transfer.chunks.clear()  # which the handle would keep until its next use
        self._idle.append(curl)

    def close(self) -> None:
        """End all transfers and connections; may be called from other threads than the loop's."""
        asyncio.run_coroutine_threadsafe(self._end_all(), self.loop).result(CONNECT_SECONDS)
        closing = threading.Thread(target=self._multi.close, daemon=True)
        closing.start()  # by itself: it waits for threads of libcurl that look up names, however long that takes
        closing.join(1.0)
        self._sockets.epoll.close()

    async def _end_all(self) -> None:
        self.loop.remove_reader(self._sockets.epoll.fileno())
        for transfer in list(self._running.values()):
            transfer.cancel()
        if self._timer is not None:
            self._timer.cancel()
        for curl in self._idle:
            curl.close()

    def _new_handle(self) -> pycurl.Curl:
        curl = new_handle(min(CONNECT_SECONDS, self.try_seconds), self._bundle)
        curl.setopt(pycurl.TIMEOUT_MS, max(1, int(self.try_seconds * 1000)))
        curl.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)  # not all requests over one connection
        curl.setopt(pycurl.DNS_CACHE_TIMEOUT, 4)  # seconds, twice those for which "no such host" is believed
        curl.setopt(pycurl.PATH_AS_IS, 1)  # addresses are signed as they are
        curl.setopt(pycurl.NOPROXY, "")  # the address knows
        return curl

    def _set_timer(self, milliseconds: int) -> None:
        """Called by libcurl: when it wants to be called. A timer that comes too early is kept: most never count."""
        if milliseconds < 0:
            self._due = None
            return
        self._due = self.loop.time() + milliseconds / 1000
        if self._timer is None or self._timer.when() > self._due:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_at(self._due, self._time_out)

    def _time_out(self) -> None:
        self._timer = None
        if self._due is None:
            return
        if self.loop.time() < self._due:
            self._timer = self.loop.call_at(self._due, self._time_out)
            return
        self._due = None
        self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
        self._collect()

    def _ready(self) -> None:
        """Bytes have come, or can be sent."""
        self._sockets.act(self._sockets.epoll.poll(0))
        self._collect()

    def _collect(self) -> None:
        """Hand over what has ended."""
        left = 1
        while left:
            left, good, bad = self._multi.info_read()
            for curl, code, message in [*((curl, pycurl.E_OK, "") for curl in good), *bad]:
                transfer = self._running[curl]
                try:
                    result = self._result(curl, transfer, code, message)
                except Exception as error:  # none of the others may be lost with it
                    result = describe_error(error)
                self.release(transfer)
                if isinstance(result, bytes):
                    transfer.set_result(result)
                elif code == pycurl.E_COULDNT_RESOLVE_HOST:
                    self._look_up(transfer, result)
                else:
                    transfer.set_exception(result)

    def _result(self, curl: pycurl.Curl, transfer: Transfer, code: int, message: str) -> bytes | Exception:
        status, limited = curl.getinfo(pycurl.RESPONSE_CODE), transfer.size is not None
        if code == pycurl.E_OK and (status == 206 or (status == 200 and not limited)):
            data = transfer.chunks[0] if len(transfer.chunks) == 1 else b"".join(transfer.chunks)
            if limited and len(data) != transfer.size and curl.getinfo(pycurl.CONTENT_LENGTH_DOWNLOAD) < 0:
                return StoreError("connection broke off", transient=True)  # before the answer had said how long it is
            return data
        if status == 416:
            return b""  # the object ends before: the reader's checksums say what is missing
        if limited and status == 200 and code in (pycurl.E_OK, pycurl.E_FILESIZE_EXCEEDED):
            return StoreError(f"the server does not answer byte ranges (status {status})")
        if status < 400 and code == pycurl.E_OPERATION_TIMEDOUT:
            if not curl.getinfo(pycurl.REQUEST_SIZE):  # nothing was sent
                return StoreError(f"no connection within {curl.getinfo(pycurl.TOTAL_TIME):.0f} s", transient=True)
            return StoreError(f"no answer within {self.try_seconds:g} s (remote.try_seconds)", transient=True)
        return error_of(curl, code, message, transfer.address.url) or StoreError(f"status {status}")

    def _look_up(self, transfer: Transfer, error: Exception) -> None:
        """Whether a host's name is wrong, or the name server had no answer: libcurl does not tell them apart."""

        def look_up() -> None:
            found = error
            try:
                socket.getaddrinfo(urlsplit(transfer.address.url).hostname, None)
            except (OSError, UnicodeError) as problem:
                if not isinstance(problem, OSError) or problem.errno != socket.EAI_AGAIN:
                    found = StoreError(str(error))
            self.loop.call_soon_threadsafe(finish, found)

        def finish(found: Exception) -> None:
            if not transfer.done():
                transfer.set_exception(found)

        try:
            threading.Thread(target=look_up, daemon=True).start()  # a name server may take long, and holds up nobody
        except RuntimeError:  # there are too many threads
            finish(error)
