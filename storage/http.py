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
from storage.curl import AsyncCurl, error_of, new_handle
from storage.policy import StoreError

CONNECT_SECONDS = 10.0  # limit within a try
LARGEST_OBJECT = 2**30  # bytes: limit of a request for a whole object, such as corpus.json


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
        self.curl: pycurl.Curl | None = None  # while it runs
        self.chunks: list[bytes] = []

    def stop(self) -> None:
        """End the transfer."""
        if self.curl is not None:
            self.client.release(self)


class HttpClient:
    """Requests byte ranges over persistent connections; only for use in its event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connections: int, try_seconds: float) -> None:
        """connections: maximum of persistent connections. try_seconds: limit of a request."""
        self.loop, self.try_seconds = loop, try_seconds
        self._bundle = os.environ.get("AWS_CA_BUNDLE")
        self._curl = AsyncCurl(loop, self._new_handle)
        self._curl.multi.setopt(pycurl.M_MAXCONNECTS, connections)
        self._running: set[Transfer] = set()

    def get(self, address: Address, start: int = 0, end: int | None = None) -> Response:
        """Request bytes [start, end), all if there is no end; returns fewer bytes if the object ends before.

        Raises StoreError for an invalid address.
        """
        curl = self._curl.handle()
        transfer = Transfer(self, address, None if end is None else end - start)
        try:
            curl.setopt(pycurl.URL, address.url)
            curl.setopt(pycurl.PROXY, address.proxy)
            curl.setopt(pycurl.HTTPHEADER, address.headers)
        except (ValueError, pycurl.error):  # invalid characters
            self._curl.stop(curl)
            raise StoreError("invalid URL") from None
        curl.setopt(pycurl.RANGE, None if end is None else f"{start}-{end - 1}")
        curl.setopt(pycurl.MAXFILESIZE_LARGE, transfer.size or LARGEST_OBJECT)  # a server may send more than requested
        curl.setopt(pycurl.WRITEFUNCTION, transfer.chunks.append)
        transfer.curl = curl
        self._running.add(transfer)
        self._curl.start(curl, lambda code, message: self._finish(transfer, code, message))
        return transfer

    def release(self, transfer: Transfer) -> None:
        """End a transfer and reuse its handle."""
        curl, transfer.curl = transfer.curl, None
        assert curl is not None
        self._running.discard(transfer)
        self._curl.stop(curl)
        transfer.chunks.clear()  # which the handle would keep until its next use

    def close(self) -> None:
        """End all transfers and connections; may be called from other threads than the loop's."""
        asyncio.run_coroutine_threadsafe(self._end_all(), self.loop).result(CONNECT_SECONDS)

    async def _end_all(self) -> None:
        for transfer in list(self._running):
            transfer.cancel()
        self._curl.close()

    def _new_handle(self) -> pycurl.Curl:
        options = {
            pycurl.TIMEOUT_MS: max(1, int(self.try_seconds * 1000)),
            pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,  # not all requests over one connection
            pycurl.DNS_CACHE_TIMEOUT: 4,  # seconds: twice the lifetime of a negative entry
            pycurl.PATH_AS_IS: 1,  # a signature covers the path as it is
            pycurl.NOPROXY: "",  # `Address.proxy` decides
        }
        return new_handle(min(CONNECT_SECONDS, self.try_seconds), options, self._bundle)

    def _finish(self, transfer: Transfer, code: int, message: str) -> None:
        """Set the result of a transfer."""
        assert transfer.curl is not None
        try:
            result = self._result(transfer.curl, transfer, code, message)
        except Exception as error:
            result = error  # a bug, with its traceback; the other transfers continue
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
                return StoreError("connection closed early", transient=True)  # the response had no length
            return data
        if status == 416:
            return b""  # the object ends before the range: the reader's checksums detect it
        if limited and status == 200 and code in (pycurl.E_OK, pycurl.E_FILESIZE_EXCEEDED):
            return StoreError(f"the server does not support byte ranges (status {status})")
        if status < 400 and code == pycurl.E_OPERATION_TIMEDOUT:
            if not curl.getinfo(pycurl.REQUEST_SIZE):  # nothing was sent
                return StoreError(f"no connection within {curl.getinfo(pycurl.TOTAL_TIME):.0f} s", transient=True)
            return StoreError(f"no response within {self.try_seconds:g} s (remote.try_seconds)", transient=True)
        return error_of(curl, code, message, transfer.address.url) or StoreError(f"status {status}")

    def _look_up(self, transfer: Transfer, error: Exception) -> None:
        """Find out whether a host does not exist or the name server failed: libcurl has one code for both."""

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
            threading.Thread(target=look_up, daemon=True).start()  # a lookup may take long
        except RuntimeError:  # there are too many threads
            finish(error)
