"""HTTP addresses of objects in S3, GCS and on web servers, with signature, credentials and proxy."""

from __future__ import annotations

import asyncio
import base64
import netrc
import os
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

SIGNED_FOR = 3600  # seconds that a signature is valid
KEPT_FOR = 600  # seconds that a signed address is reused: temporary credentials are renewed before they expire


@dataclass(frozen=True)
class Address:
    """URL, headers and proxy of a request, valid until a time of `time.monotonic`.

    headers: at least one; otherwise a handle of libcurl keeps those of its last request.
    """

    url: str
    headers: list[str]
    proxy: str
    until: float


async def sign(filesystem: Any, path: str) -> Address | None:
    """The address of an object in a file system of fsspec; None where only the file system itself can read it."""
    kind = filesystem.protocol if isinstance(filesystem.protocol, str) else filesystem.protocol[0]
    if kind == "s3" and not (filesystem.req_kw or filesystem.s3_additional_kwargs):
        return address(await filesystem._url(path, expires=SIGNED_FOR), {}, KEPT_FOR)
    if kind in ("gs", "gcs") and not filesystem.requester_pays:
        headers: dict[str, str] = {}
        await asyncio.to_thread(filesystem.credentials.apply, headers)  # may request a new token
        return address(filesystem.url(path), headers, 60.0)
    if kind in ("http", "https") and not filesystem.kwargs:
        url = str(filesystem.encode_url(path))
        return address(url, login_of(urlsplit(url).hostname), KEPT_FOR)
    return None


def address(url: str, headers: dict[str, str], seconds: float) -> Address:
    """An address with the proxy that the environment names for it."""
    parts = urlsplit(url)
    proxy = "" if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme, "")
    headers = {"Accept-Encoding": "identity", **headers}
    return Address(url, [f"{name}: {value}" for name, value in headers.items()], proxy, time.monotonic() + seconds)


def login_of(host: str | None) -> dict[str, str]:
    """The header with a host's user and password of ~/.netrc (or the file that NETRC names); empty without them."""
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host or "")
    except (OSError, netrc.NetrcParseError):
        return {}
    if found is None:
        return {}
    return {"Authorization": "Basic " + base64.b64encode(f"{found[0]}:{found[2] or ''}".encode()).decode()}
