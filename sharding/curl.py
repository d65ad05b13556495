"""Handles of libcurl, and what its transfers' ends mean."""

from __future__ import annotations

import ssl
from http import HTTPStatus
from urllib.parse import urlsplit

import pycurl

from sharding.remote import AGAIN, WebError

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


def error_of(curl: pycurl.Curl, code: int, message: str, url: str) -> FileNotFoundError | WebError | None:
    """What went wrong, when libcurl ended a transfer with `code`; None: nothing."""
    status = curl.getinfo(pycurl.RESPONSE_CODE)
    if status >= 400:
        if status == HTTPStatus.NOT_FOUND:
            return FileNotFoundError(url)
        phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
        return WebError(f"HTTP {status} {phrase}".strip(), status=status, after=curl.getinfo(pycurl.RETRY_AFTER))
    if code == pycurl.E_OK:
        return None
    proxy_status = curl.getinfo(pycurl.HTTP_CONNECTCODE)
    if status == 0 and proxy_status >= 400:
        return WebError(f"the proxy says status {proxy_status}", passing=proxy_status in AGAIN)
    if code in BROKEN_OFF or (code == pycurl.E_UNSUPPORTED_PROTOCOL and "HTTP/0.9" in message):
        return WebError("connection broke off", passing=True)
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
    reason, passing = reasons.get(code, (f"cannot be fetched: {message}", False))
    return WebError(reason, passing=passing)
