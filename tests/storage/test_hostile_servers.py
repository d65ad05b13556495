"""Packing from web servers whose responses are endless, grow when decompressed, or arrive a byte at a time."""

import contextlib
import gzip
import io
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from descriptors import many_descriptors
from PIL import Image

from sharding.build import build_corpus
from sharding.media.sources import Media
from sharding.shards.failures import read_failures
from storage.fetching import Bounds, Fetching
from storage.policy import StoreError
from storage.web import WebClient

MB = 10**6
BOUNDS = Bounds(bytes=2 * MB, seconds=4)
OK = b"HTTP/1.1 200 OK\r\n"
CHUNK = b"%x\r\n%s\r\n" % (MB // 4, bytes(MB // 4))
LENGTH = b"Content-Length: %d\r\n"


def jpeg() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(out, "JPEG")
    return out.getvalue()


def bomb() -> bytes:
    """Half a megabyte that decompresses to 400 MB."""
    return gzip.compress(bytes(400 * MB), 6)


def endless(head: bytes, part: bytes, pause: float = 0) -> Callable[[str], Iterator[bytes]]:
    def response(host: str) -> Iterator[bytes]:
        yield head
        for _ in itertools.repeat(None):
            yield part
            time.sleep(pause)

    return response


def once(*parts: bytes) -> Callable[[str], Iterator[bytes]]:
    return lambda host: iter(parts)


RESPONSES: dict[str, Callable[[str], Iterator[bytes]]] = {
    "/good.jpg": once(OK + LENGTH % len(jpeg()) + b"\r\n" + jpeg()),
    "/chunked": endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", CHUNK),
    "/unlimited": endless(OK + b"Connection: close\r\n\r\n", bytes(MB // 4)),
    "/huge": endless(OK + LENGTH % 10**13 + b"\r\n", bytes(MB // 4)),
    "/more": endless(OK + LENGTH % 10 + b"\r\n", bytes(MB // 4)),
    "/bomb": once(OK + b"Content-Encoding: gzip\r\n" + LENGTH % len(bomb()) + b"\r\n", bomb()),
    "/drip": endless(OK + LENGTH % MB + b"\r\n", b"x", 0.1),
    "/trickle": endless(OK + LENGTH % MB + b"\r\n", bytes(500), 0.1),
    "/headers": endless(OK, b"X-More: " + b"x" * 1000 + b"\r\n"),
    "/header": endless(OK + b"X-More: ", b"x" * 1000),
    "/dripping-headers": endless(OK, b"X: y\r\n", 0.1),
    "/continue": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.001),
    "/moved": endless(b"HTTP/1.1 302 Found\r\nLocation: /good.jpg\r\n" + LENGTH % 10**13 + b"\r\n", bytes(MB)),
    "/round": once(b"HTTP/1.1 302 Found\r\nLocation: /round\r\n" + LENGTH % 0 + b"\r\n"),
    "/farther": lambda host: iter([b"HTTP/1.1 302 Found\r\nLocation: /farther/x\r\n" + LENGTH % 0 + b"\r\n"]),
    "/gone": endless(b"HTTP/1.1 404 Not Found\r\nConnection: close\r\n\r\n", bytes(MB // 4)),
    "/busy": endless(b"HTTP/1.1 503 Busy\r\nConnection: close\r\n\r\n", bytes(MB // 4)),
}


def serve(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError, IndexError):
        while True:
            request = b""
            while b"\r\n\r\n" not in request:
                data = connection.recv(65536)
                if not data:
                    return
                request += data
            path = request.split(b" ")[1].decode()
            for part in RESPONSES.get(path, RESPONSES["/farther"])(path):
                connection.sendall(part)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server's address; its threads end with their connections."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


@pytest.fixture
def client() -> Iterator[WebClient]:
    client = WebClient(
        Fetching(connections=32, per_host=32, attempts=1, timeout=2)
    )  # 1: a busy machine sends /trickle too slowly
    yield client
    client.close()


TOO_LARGE, SLOW = "larger than 2 MB: raise --max-mb", "timed out"
REASONS = {
    "/chunked": TOO_LARGE,
    "/unlimited": TOO_LARGE,
    "/huge": TOO_LARGE,
    "/bomb": TOO_LARGE,
    "/drip": SLOW,
    "/trickle": "not complete after 4 seconds: raise --timeout",
    "/headers": "incomplete headers",
    "/header": "incomplete headers",
    "/dripping-headers": SLOW,
    "/continue": "(not complete after 4 seconds|incomplete headers|timed out)",
    "/moved": "not complete after 4 seconds: raise --timeout",
    "/round": "cannot be fetched: .*redirects",
    "/farther": "cannot be fetched: .*redirects",
    "/busy": "HTTP 503",
    "/gone": "file not found",
}


def test_every_endless_response_is_ended_with_its_reason(server: str, client: WebClient) -> None:
    files = {path: io.BytesIO() for path in [*REASONS, "/more"]}
    began = time.monotonic()
    futures = {path: client.fetch(server + path, file, BOUNDS) for path, file in files.items()}
    for path, reason in REASONS.items():
        with pytest.raises(StoreError, match=reason):
            futures[path].result(timeout=60)
    assert futures["/more"].result(timeout=60).read() == bytes(10)
    assert time.monotonic() - began < 30
    assert max(len(file.getbuffer()) for file in files.values()) <= BOUNDS.bytes


def test_a_busy_server_is_retried_and_too_large_a_response_is_not(server: str) -> None:
    client = WebClient(Fetching(attempts=2, timeout=20))
    began = time.monotonic()
    with pytest.raises(StoreError, match=TOO_LARGE):
        client.fetch(server + "/unlimited", io.BytesIO(), BOUNDS).result(timeout=60)
    with pytest.raises(StoreError, match="503"):
        client.fetch(server + "/busy", io.BytesIO(), BOUNDS).result(timeout=60)
    assert 0.3 <= time.monotonic() - began < 15
    client.close()


@pytest.mark.parametrize("media_type", ["image", "video"])
def test_packing_from_a_hostile_server_above_descriptor_1023(server: str, tmp_path: Path, media_type: str) -> None:
    names = ["/good.jpg", "/chunked", "/huge", "/bomb", "/header", "/gone"]
    (tmp_path / "a.json").write_text(json.dumps([{"image": server + name, "caption": name} for name in names]))
    fetching = Fetching(attempts=1, timeout=5, max_mb=3)
    annotations, output = [str(tmp_path / "a.json")], str(tmp_path / "out")
    with many_descriptors():
        corpus = build_corpus(annotations, "", media_type, output, size=48, max_failures=1, fetching=fetching)
    reasons = {row["source"].rpartition("/")[2]: row["reason"] for row in read_failures(output)}
    assert {reasons.pop(name) for name in ("chunked", "huge", "bomb")} == {"larger than 3 MB: raise --max-mb"}
    assert reasons["header"] == "incomplete headers"
    assert reasons["gone"] == "file not found"
    assert set(reasons) - {"good.jpg"} == {"header", "gone"}
    assert corpus.samples + len(set(reasons) & {"good.jpg"}) == 1


@pytest.mark.parametrize("media_type", ["image", "video"])
def test_pipes_and_devices_among_the_media_are_failures(tmp_path: Path, media_type: str) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    with Media(str(tmp_path), media_type, tmp_path, Fetching()) as media:
        found = [str(found) for _, found in media.fetched(["pipe.jpg", "zero.jpg"])]
    assert found == ["not a regular file"] * 2
