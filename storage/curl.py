"""libcurl in an asyncio loop: handles, transfers, and errors for their results."""

from __future__ import annotations

import asyncio
import contextlib
import select
import ssl
import threading
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

import pycurl

from storage.policy import TRANSIENT_STATUSES, StoreError, status_error

AGENT = "Mozilla/5.0 (compatible; singularity-at-scale)"  # some hosts refuse clients without a name
BUFFER = 2**18  # bytes handed over at a time
BROKEN_OFF = {
    pycurl.E_PARTIAL_FILE,
    pycurl.E_GOT_NOTHING,
    pycurl.E_SEND_ERROR,
    pycurl.E_RECV_ERROR,
    pycurl.E_HTTP2,
    pycurl.E_FTP_WEIRD_SERVER_REPLY,  # an unparsable reply of any server
    92,  # CURLE_HTTP2_STREAM, which pycurl does not name
}
TOO_LARGE = 100  # CURLE_TOO_LARGE, which pycurl does not name: a header of more than 100 KB
INTERESTS = {
    pycurl.POLL_IN: select.EPOLLIN,
    pycurl.POLL_OUT: select.EPOLLOUT,
    pycurl.POLL_INOUT: select.EPOLLIN | select.EPOLLOUT,
}


class AsyncCurl:
    """Runs transfers of libcurl in an asyncio loop; only for use in that loop.

    One epoll watches the sockets of libcurl, and the loop watches that epoll: registering each socket with the loop for
    every request costs more. select(), and so CurlMulti.fdset, fails above descriptor 1,023.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, make_handle: Callable[[], pycurl.Curl]) -> None:
        self.loop, self.multi = loop, pycurl.CurlMulti()
        self._make_handle = make_handle
        self._idle: list[pycurl.Curl] = []
        self._epoll = select.epoll()
        self._ended: dict[pycurl.Curl, Callable[[int, str], None]] = {}
        self._due: float | None = None  # when to call libcurl
        self._timer: asyncio.TimerHandle | None = None  # fires at that time or before
        self.multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        self.multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)
        loop.add_reader(self._epoll.fileno(), self._ready)

    def handle(self) -> pycurl.Curl:
        """A handle, to be given to `stop` after its transfer."""
        return self._idle.pop() if self._idle else self._make_handle()

    def start(self, curl: pycurl.Curl, ended: Callable[[int, str], None]) -> None:
        """Begin a transfer; `ended` is called with libcurl's code and message, and must not raise."""
        self._ended[curl] = ended
        self.multi.add_handle(curl)

    def stop(self, curl: pycurl.Curl) -> None:
        """End a transfer, if need be by closing its connection, and keep its handle for another one."""
        if self._ended.pop(curl, None) is not None:
            self.multi.remove_handle(curl)
        self._idle.append(curl)

    def close(self) -> None:
        """Close all connections, after the transfers have ended."""
        for curl in self._idle:
            curl.close()
        self.loop.remove_reader(self._epoll.fileno())
        if self._timer is not None:
            self._timer.cancel()
        closing = threading.Thread(target=self.multi.close, daemon=True)
        closing.start()  # in a thread: it waits for name lookups of libcurl, however long they take
        closing.join(1.0)
        self._epoll.close()

    def _watch(self, what: int, descriptor: int, *_: object) -> None:
        """Called by libcurl: which events of a socket to watch."""
        with contextlib.suppress(OSError, ValueError):  # the socket, or the epoll, may be closed already
            if what == pycurl.POLL_REMOVE:
                self._epoll.unregister(descriptor)
                return
            try:
                self._epoll.register(descriptor, INTERESTS[what])
            except FileExistsError:
                self._epoll.modify(descriptor, INTERESTS[what])

    def _set_timer(self, milliseconds: int) -> None:
        """libcurl's timer callback. An earlier timer is kept, since most are replaced before they fire."""
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
        self.multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
        self._collect()

    def _ready(self) -> None:
        """Let libcurl read and write where it can."""
        for descriptor, events in self._epoll.poll(0):
            readable, writable = events & ~select.EPOLLOUT, events & select.EPOLLOUT
            action = (pycurl.CSELECT_IN if readable else 0) | (pycurl.CSELECT_OUT if writable else 0)
            self.multi.socket_action(descriptor, action)
        self._collect()

    def _collect(self) -> None:
        """Report the transfers that have ended."""
        left = 1
        while left:
            left, good, bad = self.multi.info_read()
            for curl, code, message in [*((curl, pycurl.E_OK, "") for curl in good), *bad]:
                ended = self._ended.pop(curl)
                self.multi.remove_handle(curl)
                ended(code, message)


def new_handle(connect_seconds: float, more: Mapping[int, object], bundle: str | None = None) -> pycurl.Curl:
    """A handle for one transfer after the other.

    more: other options of libcurl. bundle: certificates to trust instead of those Python trusts.
    """
    curl = pycurl.Curl()
    certificates = ssl.get_default_verify_paths()
    options = {
        pycurl.NOSIGNAL: 1,
        pycurl.USERAGENT: AGENT,
        pycurl.FOLLOWLOCATION: 1,
        pycurl.MAXREDIRS: 10,
        pycurl.PROTOCOLS: pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS,
        pycurl.BUFFERSIZE: BUFFER,
        pycurl.CONNECTTIMEOUT_MS: int(connect_seconds * 1000),
        **more,
    }
    if bundle or certificates.cafile:
        options[pycurl.CAINFO] = bundle or certificates.cafile
    if certificates.capath and not bundle:
        options[pycurl.CAPATH] = certificates.capath
    for name, value in options.items():
        curl.setopt(name, value)
    return curl


def host_of(url: str) -> str:
    """Host and port of an address."""
    try:
        parts = urlsplit(url)
        return f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
    except ValueError:
        return url


def error_of(curl: pycurl.Curl, code: int, message: str, url: str) -> StoreError | None:
    """The error of a transfer that libcurl ended with `code`; None if it succeeded."""
    status = curl.getinfo(pycurl.RESPONSE_CODE)
    if status >= 400:
        return status_error(status, float(curl.getinfo(pycurl.RETRY_AFTER)))
    if code == pycurl.E_OK:
        return None
    proxy_status = curl.getinfo(pycurl.HTTP_CONNECTCODE)
    if status == 0 and proxy_status >= 400:
        return StoreError(f"proxy: {status_error(proxy_status)}", transient=proxy_status in TRANSIENT_STATUSES)
    if code == TOO_LARGE or "Too large response headers" in message:
        return StoreError("incomplete headers")
    if code in BROKEN_OFF or (code == pycurl.E_UNSUPPORTED_PROTOCOL and "HTTP/0.9" in message):
        return StoreError("connection closed early", transient=True)
    host = host_of(url)
    name = host.rpartition(":")[0]
    reasons = {
        pycurl.E_OPERATION_TIMEDOUT: ("timed out", True),
        pycurl.E_COULDNT_CONNECT: (f"cannot connect to {host}", True),
        pycurl.E_COULDNT_RESOLVE_HOST: (f"host not found: {name}", True),  # overloaded name servers report this, too
        pycurl.E_COULDNT_RESOLVE_PROXY: ("proxy not found", True),  # the message may hold its password
        pycurl.E_PEER_FAILED_VERIFICATION: (f"no valid certificate: {name}", False),
        pycurl.E_SSL_CONNECT_ERROR: (f"no encrypted connection: {name}", "wrong version number" not in message),
        pycurl.E_URL_MALFORMAT: ("invalid URL", False),
    }
    reason, transient = reasons.get(code, (f"cannot be fetched: {message}", False))
    return StoreError(reason, transient=transient)
