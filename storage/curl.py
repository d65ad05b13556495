"""Handles of libcurl, its sockets in an epoll, and what its transfers' ends mean."""

from __future__ import annotations

import contextlib
import select
import ssl
from collections.abc import Iterable
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
    pycurl.E_FTP_WEIRD_SERVER_REPLY,  # of any server
    92,  # CURLE_HTTP2_STREAM, which pycurl does not name
}
TOO_LARGE = 100  # CURLE_TOO_LARGE, which pycurl does not name: a header of more than 100 KB
INTERESTS = {
    pycurl.POLL_IN: select.EPOLLIN,
    pycurl.POLL_OUT: select.EPOLLOUT,
    pycurl.POLL_INOUT: select.EPOLLIN | select.EPOLLOUT,
}


class Sockets:
    """The sockets of a CurlMulti, watched by one epoll; select(), and so CurlMulti.fdset, ends at descriptor 1,023.

    A socket comes and goes with every request: one epoll is cheaper than objects of an event loop for each.
    """

    def __init__(self, multi: pycurl.CurlMulti) -> None:
        self.multi, self.epoll = multi, select.epoll()
        multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)

    def _watch(self, what: int, descriptor: int, *_: object) -> None:
        """Called by libcurl: what it wants to know of a socket."""
        with contextlib.suppress(OSError, ValueError):  # the socket, or the epoll, may be closed already
            if what == pycurl.POLL_REMOVE:
                self.epoll.unregister(descriptor)
                return
            try:
                self.epoll.register(descriptor, INTERESTS[what])
            except FileExistsError:
                self.epoll.modify(descriptor, INTERESTS[what])

    def act(self, found: Iterable[tuple[int, int]]) -> None:
        """Let libcurl read and write where it can; `found`: (descriptor, events) as the epoll gives them."""
        for descriptor, events in found:
            readable, writable = events & ~select.EPOLLOUT, events & select.EPOLLOUT
            action = (pycurl.CSELECT_IN if readable else 0) | (pycurl.CSELECT_OUT if writable else 0)
            self.multi.socket_action(descriptor, action)


def new_handle(connect_seconds: float, bundle: str | None = None) -> pycurl.Curl:
    """A handle for one transfer after the other. bundle: certificates to trust instead of those Python trusts."""
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
    """What went wrong, when libcurl ended a transfer with `code`; None: nothing."""
    status = curl.getinfo(pycurl.RESPONSE_CODE)
    if status >= 400:
        return status_error(status, float(curl.getinfo(pycurl.RETRY_AFTER)))
    if code == pycurl.E_OK:
        return None
    proxy_status = curl.getinfo(pycurl.HTTP_CONNECTCODE)
    if status == 0 and proxy_status >= 400:
        return StoreError(f"proxy: {status_error(proxy_status)}", transient=proxy_status in TRANSIENT_STATUSES)
    if code == TOO_LARGE or "Too large response headers" in message:
        return StoreError("its headers have no end")
    if code in BROKEN_OFF or (code == pycurl.E_UNSUPPORTED_PROTOCOL and "HTTP/0.9" in message):
        return StoreError("connection broke off", transient=True)
    host = host_of(url)
    name = host.rpartition(":")[0]
    reasons = {
        pycurl.E_OPERATION_TIMEDOUT: ("timed out", True),
        pycurl.E_COULDNT_CONNECT: (f"cannot connect to {host}", True),
        pycurl.E_COULDNT_RESOLVE_HOST: (f"host not found: {name}", True),  # name servers under load say so, too
        pycurl.E_COULDNT_RESOLVE_PROXY: ("proxy not found", True),  # the message may hold its password
        pycurl.E_PEER_FAILED_VERIFICATION: (f"no valid certificate: {name}", False),
        pycurl.E_SSL_CONNECT_ERROR: (f"no encrypted connection: {name}", "wrong version number" not in message),
        pycurl.E_URL_MALFORMAT: ("no valid address", False),
    }
    reason, transient = reasons.get(code, (f"cannot be fetched: {message}", False))
    return StoreError(reason, transient=transient)
