"""The client of web servers: redirects, compressed responses, Retry-After, certificates, cancelling."""

import gzip
import io
import multiprocessing
import os
import threading
from concurrent.futures import CancelledError
from contextlib import closing, suppress
from http.server import ThreadingHTTPServer
from urllib.parse import unquote

import pytest
from web_servers import Handler, encrypt, serving

from storage.fetching import Fetching
from storage.policy import RetryPolicy, StoreError
from storage.web import WebClient

BOUNDS = Fetching().bounds("image")
BODY = bytes(range(256)) * 4000  # about a megabyte


class Responses(Handler):
    def do_GET(self) -> None:
        path = unquote(self.path)
        if path == "/moved":
            return self.say(302, b"", Location="/été 1.jpg")
        if path == "/busy":
            return self.say(429, b"", **{"Retry-After": "7"})
        if path == "/zipped":
            return self.say(200, gzip.compress(BODY), **{"Content-Encoding": "gzip"})
        if path == "/agent":
            return self.say(200, self.headers["User-Agent"].encode())
        if path == "/stuck":
            self.server.stuck.wait(20)
        return self.say(200, BODY if path in ("/été 1.jpg", "/stuck") else path.encode())


@pytest.fixture
def server():
    with serving(Responses, stuck=threading.Event()) as server:
        yield server
        server.stuck.set()


@pytest.fixture
def client():
    client = WebClient(Fetching(connections=4, per_host=2, attempts=1, timeout=20))
    yield client
    client.close()


def address(server: ThreadingHTTPServer, path: str) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}{path}"


def download(client: WebClient, url: str) -> bytes:
    return client.fetch(url, io.BytesIO(), BOUNDS).result(timeout=60).read()


@pytest.mark.parametrize(
    "path", ["/été 1.jpg", "/%C3%A9t%C3%A9%201.jpg", "/moved", "/zipped", "/%C3%A9t%C3%A9%201.jpg#x"]
)
def test_redirects_quoting_and_compression_work_as_in_a_browser(server, client, path: str) -> None:
    assert download(client, address(server, path)) == BODY


def test_many_addresses_share_few_connections(server, client) -> None:
    futures = {
        path: client.fetch(address(server, path), io.BytesIO(), BOUNDS) for path in (f"/{n}" for n in range(300))
    }
    assert all(future.result(timeout=60).read() == path.encode() for path, future in futures.items())


def test_the_client_sends_its_name(server, client) -> None:
    assert b"singularity" in download(client, address(server, "/agent"))


def test_retry_after_is_honoured(server, client) -> None:
    with pytest.raises(StoreError, match="HTTP 429 Too Many Requests") as caught:
        download(client, address(server, "/busy"))
    assert 7 <= RetryPolicy().pause(caught.value, 1) <= 7.6


@pytest.mark.parametrize("url", ["http://", "http://[1/x.jpg", "http://a:b/x.jpg", "http:///x.jpg"])
def test_an_invalid_url_is_named(client, url: str) -> None:
    with pytest.raises(StoreError, match=r"invalid URL|host not found"):
        download(client, url)


def test_a_file_that_cannot_be_written_is_the_error(server, client) -> None:
    with open("/dev/full", "wb+", buffering=0) as full, pytest.raises(OSError, match="No space left"):
        client.fetch(address(server, "/moved"), full, BOUNDS).result(timeout=60)


def test_closing_cancels_downloads_and_later_ones_work(server, client) -> None:
    future = client.fetch(address(server, "/stuck"), io.BytesIO(), BOUNDS)
    client.close()
    with pytest.raises(CancelledError):
        future.result(timeout=60)
    assert download(client, address(server, "/1")) == b"/1"


def test_a_forked_process_gets_an_error_instead_of_waiting_forever(client) -> None:
    def fetch() -> None:
        with suppress(RuntimeError):
            client.fetch("http://127.0.0.1:9/", io.BytesIO(), BOUNDS)
            os._exit(1)
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=fetch)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_certificates_are_verified_with_those_that_python_trusts(
    server, client, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = encrypt(server)
    url = f"https://localhost:{server.server_address[1]}/1"
    with pytest.raises(StoreError, match="no valid certificate: localhost"):
        download(client, url)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with closing(WebClient(Fetching(attempts=1, timeout=20))) as trusting:
        assert download(trusting, url) == b"/1"
